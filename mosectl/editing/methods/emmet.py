"""EMMET: ROME's equality constraint for a whole batch (arXiv 2403.14236, eq. 10)."""

from __future__ import annotations

from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Option, Published, Solver
from mosectl.editing.methods.memit import right_divide
from mosectl.editing.methods.rome import LAYERS


class Emmet(Solver):
    """W' = W + (V − W K)(Kᵀ (λC)⁻¹ K + αI)⁻¹ Kᵀ (λC)⁻¹; α = 0 meets every target exactly.

    λ only scales α. One fact alone has no α (github.com/scalable-model-editing/unified-model-editing).
    """

    name, side, source, placement = "emmet", "additive", "arXiv 2403.14236", SPREAD
    settings = PUBLISHED
    published = Published(layers=LAYERS)
    options = {
        "preserve": Option(1.0, "λ; 1,000 as published for GPT-2 XL"),
        "ridge": Option(0.1, "α (near-equal keys make KᵀC⁻¹K singular)"),
        "relative": Option(0.0, "1: α is a share of the mean diagonal of KᵀC⁻¹K, of one fact as well"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        o = problem.options
        directions = right_divide(problem.K.T, problem.kept(o["preserve"]))  # (m, p) = Kᵀ (λC)⁻¹
        G = directions @ problem.K
        if o["relative"]:
            G.diagonal().add_(o["ridge"] * G.diagonal().mean())
        elif len(G) > 1:
            G.diagonal().add_(o["ridge"])
        return problem.W + right_divide(problem.V - problem.W @ problem.K, (G + G.T) / 2) @ directions
