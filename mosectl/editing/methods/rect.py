"""RECT: keep only the entries of MEMIT's update that change most relative to the weight (arXiv 2401.04700, §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import LayerProblem, Option
from mosectl.editing.methods.memit import Memit


class Rect(Memit):
    """W' = W + ΔW where |ΔW / W| is among the largest ``keep`` share of all entries, ΔW = MEMIT's; W elsewhere."""

    name, source = "rect", "arXiv 2401.04700"
    options = {
        "preserve": Option(1.0, "as MEMIT's"),
        "keep": Option(0.4, "share of the entries that change, between 0 and 1: those of largest relative change"),
    }

    def update(self, problem: LayerProblem) -> Tensor:
        D = super().update(problem) - problem.W
        relative = (D / problem.W).abs().nan_to_num(torch.inf).flatten()
        n = round(problem.options["keep"] * len(relative))
        kept = torch.zeros_like(relative).index_fill_(0, relative.topk(n).indices, 1.0)
        return problem.W + D * kept.view_as(D)
