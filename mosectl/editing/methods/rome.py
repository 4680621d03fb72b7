"""ROME: a rank-one update that makes one key give exactly its value (arXiv 2202.05262, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import PUBLISHED, SPREAD, LayerProblem, Solver
from mosectl.editing.methods.memit import right_divide


class Rome(Solver):
    """W' = W + (v − W k)(C⁻¹k)ᵀ / kᵀC⁻¹k, one fact after the other: a later one of a batch may undo an earlier one."""

    name, side, source, placement = "rome", "additive", "arXiv 2202.05262", SPREAD
    settings = PUBLISHED

    def update(self, problem: LayerProblem) -> Tensor:
        W = problem.W
        directions = right_divide(problem.K.T, problem.kept())  # rows (C⁻¹ k)ᵀ
        for k, v, c in zip(problem.K.T, problem.V.T, directions, strict=True):
            W = W + torch.outer(v - W @ k, c) / (c @ k)
        return W
