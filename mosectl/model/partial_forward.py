"""The part of a model that an optimiser runs again and again: the layers from one upward, the tokens from one onward.

Below the lowest edited layer nothing changes, and left of the token whose state is moved nothing changes either: the lower
layers' outputs and the left tokens' attention keys and values are computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mosectl.model.architecture import Architecture
from mosectl.model.forward import Batch, hooked, layer_modules, logits_at, stop

# Do cached keys and values give a model's own logits?
_TRUSTED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
AGREES = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative, of log-probabilities
ROUGHLY = 3e-2  # in half precision


@dataclass(frozen=True)
class Past:
    """Attention keys and values of the tokens that stay as they are, left-padded to one width."""

    states: list[tuple[Tensor, Tensor] | None]  # by layer: (B, heads, P, head size) each
    mask: Tensor  # (B, P)
    still: Tensor  # (B,) how many tokens of each row they stand for
    placed: bool  # the model takes position_ids
    cache: str  # the argument that takes keys and values: "cache", in older transformers "past_key_values"

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, batch: Batch, still: Tensor) -> Past:
        """Run the first ``still`` (B,) tokens of each sequence once."""
        from transformers import DynamicCache

        P = int(still.max())
        column = torch.arange(P, device=still.device) - (P - still)[:, None]  # (B, P) token number, negative = padding
        ids = batch.input_ids.gather(1, column.clamp_min(0))
        mask = (column >= 0).long()
        cache = DynamicCache()
        taken = inspect.signature(model.forward).parameters
        placed, name = "position_ids" in taken, "cache" if "cache" in taken else "past_key_values"
        place = {"position_ids": column.clamp_min(0)} if placed else {}
        with logits_at(model, torch.zeros_like(still)[:, None]):
            model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}, **place)
        pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
        states = [(k, v) if isinstance(k, Tensor) and isinstance(v, Tensor) and k.numel() else None for k, v in pairs]
        return Past(states, mask, still, placed, name)

    def kwargs(self, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """What to call the model with for the tokens behind the past of some rows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, pair in enumerate(self.states):
            if pair:
                keys, values = (x[rows.to(x.device)] for x in pair)
                cache.update(keys, values, layer)
        mask = torch.cat([self.mask[rows], batch.attention_mask], 1)
        place = torch.arange(batch.input_ids.shape[1], device=rows.device) + self.still[rows][:, None]
        whole = {"input_ids": batch.input_ids, "attention_mask": mask, self.cache: cache, "use_cache": True}
        return {**whole, "position_ids": place} if self.placed else whole


class Suffix:
    """The layers from ``first`` upward, run many times on one batch.

    Below ``first`` every layer is skipped and layer first−1's recorded output is handed up instead, for the rows asked.

    Args:
        still: (B,) number of tokens at each row's beginning that nothing moves, and whose logits are not asked; None: none.
    """

    def __init__(
        self, model: nn.Module, arch: Architecture, first: int, batch: Batch, still: Tensor | None = None
    ) -> None:
        self.model, self.first = model, first
        self.layers = layer_modules(model, arch)
        self.past = Past.of(model, batch, still) if still is not None and _serves(model, arch, batch, still) else None
        self.offset = torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device)
        if self.past:
            self.offset = self.past.still
            batch = _behind(batch, self.offset)
        self.batch = batch
        self.cached: Any = None
        self.shared: dict[str, Any] = {}  # keys and values that layers above reuse (Gemma 4)
        if first > 0:

            def record(_: nn.Module, __: Any, kwargs: dict[str, Any], out: Any) -> None:
                self.cached, self.shared = out, dict(kwargs.get("shared_kv_states") or {})
                raise stop

            hook = self.layers[first - 1].register_forward_hook(record, with_kwargs=True)
            every = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
            with hooked([hook]), torch.no_grad(), suppress(stop):
                model(**self._kwargs(every, batch))

    def _kwargs(self, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return self.past.kwargs(rows, batch) if self.past else batch.kwargs()

    def alike(self, rows: Tensor) -> list[Tensor]:
        """``rows`` (int64) in two parts, the shorter and the longer, where that saves a fifth of the tokens; else in one."""
        length = self.batch.attention_mask.sum(1)[rows]
        length, order = length.sort(stable=True)
        n = len(rows)
        below = torch.arange(1, n + 1, device=rows.device)  # rows in the shorter part
        tokens = below * length + (n - below) * length[-1]
        best = int(tokens.argmin())
        if self.shared or tokens[best] > 0.8 * n * length[-1]:
            return [rows]
        return [rows[order[: best + 1]], rows[order[best + 1 :]]]

    def logits(self, rows: Tensor, positions: Tensor, asked: Tensor) -> Tensor:
        """Logits (K, vocabulary) in float32 at those of ``positions`` (len(rows), m) of the rows ``rows`` (int64) that are
        ``asked`` (len(rows), m), row by row.
        """
        batch = self.batch.rows(rows)
        width = batch.input_ids.shape[1] if self.shared else int(batch.attention_mask.sum(1).max())
        batch = Batch(batch.input_ids[:, :width], batch.attention_mask[:, :width])
        at = (positions - self.offset[rows][:, None]).clamp_min(0)  # padding may point before the first token
        with self._skipping(rows, width), logits_at(self.model, at, asked):
            return self.model(**self._kwargs(rows, batch)).logits[0].float()

    @contextmanager
    def _skipping(self, rows: Tensor, width: int) -> Iterator[None]:
        def take(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(map(take, value))
            if not isinstance(value, Tensor):
                return value
            value = value[rows.to(value.device)]
            return value[:, :width].contiguous() if value.dim() == 3 else value  # (rows, tokens, d)

        replay, shared = take(self.cached), {kind: take(pair) for kind, pair in self.shared.items()}

        def skip(*_: Any, **kwargs: Any) -> Any:
            if shared:
                kwargs["shared_kv_states"].update(shared)
            return replay

        skipped = list(self.layers)[: self.first]
        # Only an own `forward` (accelerate's) has to come back; a plain layer's is its class's.
        own = [layer.__dict__.get("forward") for layer in skipped]
        try:
            for layer in skipped:
                layer.forward = skip  # type: ignore[method-assign]
            yield
        finally:
            for layer, forward in zip(skipped, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward  # type: ignore[method-assign]


def _behind(batch: Batch, still: Tensor) -> Batch:
    """Each row's tokens from number ``still`` on, right-padded."""
    width = int((batch.attention_mask.sum(1) - still).max())
    column = torch.arange(width, device=still.device) + still[:, None]
    inside = column < batch.input_ids.shape[1]
    column = column.clamp_max(batch.input_ids.shape[1] - 1)
    return Batch(batch.input_ids.gather(1, column), batch.attention_mask.gather(1, column) * inside)


def _serves(model: nn.Module, arch: Architecture, batch: Batch, still: Tensor) -> bool:
    """Is there a past, and does the model, tried once on a few rows, give the same logits with it?"""
    if not bool(still.any()):
        return False
    if model not in _TRUSTED:
        few = still.topk(min(4, len(still))).indices
        _TRUSTED[model] = _agrees(model, arch, batch.rows(few), still[few])
    return _TRUSTED[model]


@torch.no_grad()
def _agrees(model: nn.Module, arch: Architecture, batch: Batch, still: Tensor) -> bool:
    every, last = torch.arange(len(still), device=still.device), batch.attention_mask.sum(1)[:, None] - 1
    asked = torch.ones_like(last, dtype=torch.bool)
    plain = Suffix(model, arch, 0, batch).logits(every, last, asked).log_softmax(-1)
    tail, at = _behind(batch, still), last - still[:, None]
    try:
        past = Past.of(model, batch, still)
        with logits_at(model, at, asked):
            logits = model(**past.kwargs(every, tail)).logits[0].float()
    except Exception:  # models do all sorts of things with a cache; without it they are only slower
        return False
    limit = AGREES.get(next(model.parameters()).dtype, ROUGHLY)
    return bool((logits.log_softmax(-1) - plain).norm() <= limit * plain.norm())
