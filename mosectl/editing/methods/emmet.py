"""EMMET: ROME's equality constraint for a whole batch (arXiv 2403.14236, eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods import PUBLISHED, LayerProblem, register
from mosectl.editing.methods.memit import right_divide


@register("emmet", side="additive", source="arXiv 2403.14236", kind="spread", settings=PUBLISHED, ridge=0.1)
def emmet(problem: LayerProblem) -> Tensor:
    """W' = W + (V − W K)(Kᵀ C⁻¹ K + αI)⁻¹ Kᵀ C⁻¹; α = 0 meets every target exactly.

    Options: ``ridge`` α as a share of the mean diagonal of KᵀC⁻¹K (near-equal keys make it singular).
    """
    directions = right_divide(problem.K.T, problem.kept())  # (m, p) = Kᵀ C⁻¹
    G = directions @ problem.K
    G = G + problem.options["ridge"] * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return problem.W + right_divide(problem.V - problem.W @ problem.K, (G + G.T) / 2) @ directions
