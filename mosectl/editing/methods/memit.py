"""MEMIT: the least-squares update of many facts at once (arXiv 2210.07229, eq. 14)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Option, Solver


class Memit(Solver):
    """W' = W + (V − W K) Kᵀ (λC + K Kᵀ)⁻¹."""

    name, side, source, placement = "memit", "additive", "arXiv 2210.07229", SPREAD
    settings = PUBLISHED
    options = {
        "preserve": Option(15_000.0, "λ, how many edits one unit of C weighs; 20,000 as published for GPT-2 XL"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        K = problem.K * problem.weight.sqrt()
        E = problem.V * problem.weight.sqrt() - problem.W @ K
        return problem.W + right_divide(E @ K.T, problem.kept(problem.options["preserve"]).addmm_(K, K.T))


def right_divide(B: Tensor, A: Tensor) -> Tensor:
    """B A⁻¹ for a symmetric A (p, p) that rounding may have made singular: its diagonal is raised by 1e-9 of its mean."""
    A = A.clone()
    A.diagonal().add_(1e-9 * A.diagonal().mean())
    return torch.linalg.solve(A, B.T).T
