"""PRUNE: MEMIT whose accumulated update has its large singular values reined in (arXiv 2405.16821, eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mosectl.editing.methods.base import Option
from mosectl.editing.methods.memit import Memit


class Prune(Memit):
    """MEMIT's update; the restraint comes once, at the end, on the sum of all updates."""

    name, source = "prune", "arXiv 2405.16821"
    options = {**Memit.options, "base": Option(1.2, "α of the logarithm")}

    def finish(self, W0: Tensor, W: Tensor, options: Mapping[str, float]) -> Tensor:
        """W₀ + U F(Σ) Zᵀ for W − W₀ = U Σ Zᵀ: F(σ) = log_α σ − log_α σ_max + σ_max above σ_max, W₀'s largest; σ below."""
        top = torch.linalg.svdvals(W0)[0]
        U, S, Zh = torch.linalg.svd(W - W0, full_matrices=False)
        held = torch.where(top < S, (S / top).log() / torch.tensor(options["base"]).log() + top, S)
        return W0 + (U * held) @ Zh
