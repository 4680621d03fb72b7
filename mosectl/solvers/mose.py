"""MOSE: one orthogonal matrix on the output side, by orthogonal Procrustes (arXiv 2601.07873, eqs. 15-20)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.rotation import nearest_rotation
from mosectl.solvers import LayerProblem, register


@register("mose", side="output", source="arXiv 2601.07873", preserve=100.0, damping=0.01)
def mose(problem: LayerProblem) -> Tensor:
    """R = argmin over rotations of λ‖R Y₀ − Y₀‖² + ‖R H − V‖², for W' = R W.

    With S = E[y yᵀ] of the outputs Y₀ = W K₀ the minimiser is the polar factor of M = λS + V Hᵀ (eqs. 18-20); earlier
    edits are samples to be kept like any other, P = Σ h hᵀ joins λS. μI is added so that directions no sample has
    touched keep still instead of taking an arbitrary turn of the SVD's null space; of the two polar factors with det ±1
    the rotation is taken.

    Options: ``preserve`` λ, how many edits one unit of S weighs; ``damping`` μ as a share of the mean diagonal of
    λS + P + H Hᵀ.
    Returns:
        R (d, d) float64.
    """
    S, H, V = problem.S.double(), problem.H.double(), problem.V.double()
    weight = problem.weight.double()
    kept = problem.options["preserve"] * S + problem.P.double()
    M = kept + (V * weight) @ H.T
    pull = problem.options["damping"] * (kept.trace() + (H.square() * weight).sum()) / len(S)
    return nearest_rotation(M + pull * torch.eye(len(S), dtype=M.dtype, device=M.device))
