"""ROME: a rank-one update that makes one key give exactly its value (arXiv 2202.05262, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods import PUBLISHED, LayerProblem, register
from mosectl.editing.methods.memit import right_divide


@register("rome", side="additive", source="arXiv 2202.05262", kind="spread", settings=PUBLISHED)
def rome(problem: LayerProblem) -> Tensor:
    """W' = W + (v − W k)(C⁻¹k)ᵀ / kᵀC⁻¹k, one fact after the other: a later one of a batch may undo an earlier one."""
    W = problem.W
    directions = right_divide(problem.K.T, problem.kept())  # rows (C⁻¹ k)ᵀ
    for k, v, c in zip(problem.K.T, problem.V.T, directions, strict=True):
        W = W + torch.outer(v - W @ k, c) / (c @ k)
    return W
