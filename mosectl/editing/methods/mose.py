"""MOSE: one orthogonal matrix on the output side, by orthogonal Procrustes (arXiv 2601.07873, eqs. 15-20)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import LayerProblem, Option, Solver
from mosectl.linalg.rotation import nearest_rotation


class Mose(Solver):
    """W' = R W with R = argmin over rotations of λ‖R Y₀ − Y₀‖² + ‖R H − V‖², H = W K.

    With S = E[y yᵀ] = W C Wᵀ of the outputs Y₀ = W K₀ the minimiser is the polar factor of M = λS + V Hᵀ (eqs. 18-20);
    earlier edits are samples to be kept like any other, W P Wᵀ joins λS. A rotation cannot change a length: V is taken at
    the length of H. μI is added so that directions no sample has touched keep still instead of taking an arbitrary turn
    of the SVD's null space; of the two polar factors with det ±1 the rotation is taken.
    """

    name, side, source = "mose", "output", "arXiv 2601.07873"
    settings = {"rounds": 8, "preservation_decay": 0.8, "margin": 3.0, "max_displacement": 1.5}
    options = {
        "preserve": Option(100.0, "λ, how many edits one unit of S weighs"),
        "damping": Option(0.01, "μ as a share of the mean diagonal of λS + W P Wᵀ + H Hᵀ"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        W, H = problem.W, problem.W @ problem.K
        V = H.norm(dim=0) * torch.nn.functional.normalize(problem.V, dim=0)
        kept = W @ problem.kept(problem.options["preserve"]).add_(problem.P) @ W.T
        M = kept + (V * problem.weight) @ H.T
        pull = problem.options["damping"] * (kept.trace() + (H.square() * problem.weight).sum()) / len(W)
        return nearest_rotation(M + pull * torch.eye(len(W), dtype=M.dtype, device=M.device)) @ W
