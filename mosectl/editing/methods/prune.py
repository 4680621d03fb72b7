"""PRUNE: MEMIT whose accumulated update has its large singular values reined in (arXiv 2405.16821, eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mosectl.editing.methods import PUBLISHED, LayerProblem, register
from mosectl.editing.methods.memit import memit


def restrain(W0: Tensor, W: Tensor, options: Mapping[str, float]) -> Tensor:
    """W₀ + U F(Σ) Zᵀ for W − W₀ = U Σ Zᵀ: F(σ) = log_α σ − log_α σ_max + σ_max above σ_max, W₀'s largest; σ below."""
    top = torch.linalg.svdvals(W0)[0]
    U, S, Zh = torch.linalg.svd(W - W0, full_matrices=False)
    held = torch.where(top < S, (S / top).log() / torch.tensor(options["base"]).log() + top, S)
    return W0 + (U * held) @ Zh


@register(
    "prune",
    side="additive",
    source="arXiv 2405.16821",
    kind="spread",
    settings=PUBLISHED,
    finish=restrain,
    preserve=1.0,
    base=1.2,
)
def prune(problem: LayerProblem) -> Tensor:
    """MEMIT's update; the restraint comes once, at the end, on the sum of all updates.

    Options: ``preserve`` as MEMIT's; ``base`` α of the logarithm.
    """
    return memit(problem)
