"""RECT: keep only the entries of MEMIT's update that change most relative to the weight (arXiv 2401.04700, §5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mosectl.editing.methods.base import Option
from mosectl.editing.methods.memit import Memit


class Rect(Memit):
    """W' = W + ΔW where |ΔW / W| is among the largest ``keep`` share of all entries, ΔW = MEMIT's; W elsewhere.

    The entries are chosen once a batch, when all layers are solved: the layers are solved as MEMIT's are.
    """

    name, source = "rect", "arXiv 2401.04700"
    options = {
        **Memit.options,
        "keep": Option(0.4, "share of the entries that change, between 0 and 1: those of largest relative change"),
    }

    def settle(self, before: Tensor, after: Tensor, options: Mapping[str, float]) -> Tensor:
        D = after - before
        relative = (D / before).abs().nan_to_num(torch.inf).flatten()
        n = round(options["keep"] * len(relative))
        kept = torch.zeros_like(relative).index_fill_(0, relative.topk(n).indices, 1.0)
        return before + D * kept.view_as(D)
