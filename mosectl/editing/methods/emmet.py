"""EMMET: ROME's equality constraint for a whole batch (arXiv 2403.14236, eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Option, Solver
from mosectl.editing.methods.memit import right_divide


class Emmet(Solver):
    """W' = W + (V − W K)(Kᵀ C⁻¹ K + αI)⁻¹ Kᵀ C⁻¹; α = 0 meets every target exactly."""

    name, side, source, placement = "emmet", "additive", "arXiv 2403.14236", SPREAD
    settings = PUBLISHED
    options = {"ridge": Option(0.1, "α as a share of the mean diagonal of KᵀC⁻¹K (near-equal keys make it singular)")}

    def update(self, problem: LayerProblem) -> Tensor:
        directions = right_divide(problem.K.T, problem.kept())  # (m, p) = Kᵀ C⁻¹
        G = directions @ problem.K
        G = G + problem.options["ridge"] * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
        return problem.W + right_divide(problem.V - problem.W @ problem.K, (G + G.T) / 2) @ directions
