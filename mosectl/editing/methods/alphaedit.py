"""AlphaEdit: MEMIT's update within the null space of the preserved keys (arXiv 2410.02355, eqs. 7, 14)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Option, Solver
from mosectl.editing.methods.memit import right_divide


class AlphaEdit(Solver):
    """W' = W + E Kᵀ N (K_p K_pᵀ N + K Kᵀ N + αI)⁻¹, E = V − W K, N the projector on C's eigenvectors below a threshold.

    Earlier edits' keys K_p K_pᵀ come as P. Threshold and α are numbers on the scale of C and of k kᵀ, as in
    github.com/jianghoucheng/AlphaEdit; ``relative`` makes them shares of what is in the model.
    """

    name, side, source, placement = "alphaedit", "additive", "arXiv 2410.02355", SPREAD
    settings = {**PUBLISHED, "previous_edit_weight": 1.0}
    options = {
        "threshold": Option(0.02, "on C's eigenvalues"),
        "ridge": Option(10.0, "α"),
        "relative": Option(0.0, "1: the threshold is a share of C's mean eigenvalue, α of a key's mean squared length"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        o = problem.options
        values, vectors = torch.linalg.eigh(problem.kept())
        null = vectors[:, values < o["threshold"] * (values.mean() if o["relative"] else 1)]
        K = null.T @ (problem.K * problem.weight.sqrt())  # keys in the null space's own coordinates: N = null nullᵀ
        E = (problem.V - problem.W @ problem.K) * problem.weight.sqrt()
        alpha = o["ridge"] * (problem.K.square().sum(0).mean() if o["relative"] else 1)
        A = null.T @ problem.P @ null + K @ K.T
        A.diagonal().add_(alpha)
        return problem.W + right_divide(E @ K.T, A) @ null.T
