"""The collapse guard: after each batch, is the model still the model it was, but for the edits?

Sequential editors wear a model down (arXiv 2401.07453): weights grow, the condition number rises, unrelated text becomes
unlikely. All three are cheap to watch, and a batch that does harm can be taken back while the ones before it stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mosectl.editing.second_moments import BEGINNING
from mosectl.linalg.spectrum import Spectrum
from mosectl.model.scoring import sequence_nll

CANARIES = 16
CANARY_TOKENS = 48
NORM_LIMIT = 1.0  # ‖W‖ may grow or shrink by this share of the base's
CONDITION_LIMIT = 10.0  # κ(W) may become this many times the base's


@dataclass(frozen=True)
class Health:
    """What is watched."""

    loss: float  # nats a token on pieces of ordinary text, the canaries
    norm: Mapping[str, float]  # ‖W‖ by module path
    condition: Mapping[str, float]  # κ(W)


def canaries(tokenizer: Any, texts: Sequence[str], most: int = CANARY_TOKENS) -> list[list[int]]:
    """Token ids of pieces of ``texts``, evenly spaced over them; ``most``: tokens that the model can read at once."""
    step = max(1, len(texts) // CANARIES)
    taken = [t[:BEGINNING] for t in texts[::step][:CANARIES]]
    pieces = [tokenizer(t, truncation=True, max_length=min(CANARY_TOKENS, most))["input_ids"] for t in taken]
    return [ids for ids in pieces if len(ids) > 1]


def health(model: nn.Module, pieces: Sequence[Sequence[int]], weights: Mapping[str, Tensor]) -> Health:
    """Measure a model whose edited weights are ``weights``, (d, p) by module path."""
    spectra = {name: Spectrum.of(W) for name, W in weights.items()}
    norm = {name: s.norm for name, s in spectra.items()}
    condition = {name: s.condition for name, s in spectra.items()}
    if not pieces:
        return Health(0.0, norm, condition)
    return Health(sum(sequence_nll(model, pieces)) / sum(len(ids) - 1 for ids in pieces), norm, condition)


def remedy(gentler: str) -> str:
    """What to try where the guard has stepped in; ``gentler``: how the method does less harm."""
    return f"try {gentler}, or --set guard=0 to go on"


def harm(base: Health, now: Health, limit: float) -> str:
    """What is wrong with ``now`` against ``base``, in words; empty if nothing is.

    Args:
        limit: nats a token by which the canaries' loss may rise; 0 switches the guard off.
    """
    if limit <= 0:
        return ""
    if not now.loss < base.loss + limit:  # NaN too
        return f"ordinary text became less likely: {base.loss:.4g} → {now.loss:.4g} nats a token, {limit:g} more are allowed"
    for name, before in base.norm.items():
        if abs(now.norm[name] / before - 1) > NORM_LIMIT:
            return f"‖W‖ of {name} went from {before:.3g} to {now.norm[name]:.3g}"
        if now.condition[name] > CONDITION_LIMIT * base.condition[name]:
            return f"κ(W) of {name} went from {base.condition[name]:.3g} to {now.condition[name]:.3g}"
    return ""
