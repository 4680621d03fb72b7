"""RECT: keep only the entries of MEMIT's update that change most relative to the weight (arXiv 2401.04700, §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods import PUBLISHED, LayerProblem, register
from mosectl.editing.methods.memit import memit


@register("rect", side="additive", source="arXiv 2401.04700", kind="spread", settings=PUBLISHED, preserve=1.0, keep=0.4)
def rect(problem: LayerProblem) -> Tensor:
    """W' = W + ΔW where |ΔW / W| is among the largest ``keep`` share of all entries, ΔW = MEMIT's; W elsewhere.

    Options: ``preserve`` as MEMIT's; ``keep`` between 0 and 1.
    """
    D = memit(problem) - problem.W
    relative = (D / problem.W).abs().nan_to_num(torch.inf).flatten()
    n = round(problem.options["keep"] * len(relative))
    kept = torch.zeros_like(relative).index_fill_(0, relative.topk(n).indices, 1.0)
    return problem.W + D * kept.view_as(D)
