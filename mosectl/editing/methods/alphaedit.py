"""AlphaEdit: MEMIT's update within the null space of the preserved keys (arXiv 2410.02355, eqs. 7, 14)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Option, Solver
from mosectl.editing.methods.memit import right_divide


class AlphaEdit(Solver):
    """W' = W + E Kᵀ N (K_p K_pᵀ N + K Kᵀ N + αI)⁻¹, E = V − W K, N the projector on C's eigenvectors below a threshold.

    Earlier edits' keys K_p K_pᵀ come as P.
    """

    name, side, source, placement = "alphaedit", "additive", "arXiv 2410.02355", SPREAD
    settings = {**PUBLISHED, "previous_edit_weight": 1.0}
    options = {
        "threshold": Option(1.0, "on C's eigenvalues as a share of their mean"),
        "ridge": Option(0.01, "α as a share of the mean squared length of a key"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        values, vectors = torch.linalg.eigh(problem.kept())
        null = vectors[:, values < problem.options["threshold"] * values.mean()]
        K = null.T @ (problem.K * problem.weight.sqrt())  # keys in the null space's own coordinates: N = null nullᵀ
        E = (problem.V - problem.W @ problem.K) * problem.weight.sqrt()
        alpha = problem.options["ridge"] * problem.K.square().sum(0).mean()
        A = null.T @ problem.P @ null + K @ K.T
        A.diagonal().add_(alpha)
        return problem.W + right_divide(E @ K.T, A) @ null.T
