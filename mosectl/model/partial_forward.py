"""The part of a model that an optimiser runs again and again: the layers from one upward, the tokens from one onward.

Below the lowest edited layer nothing changes, and left of the token whose state is moved nothing changes either: the lower
layers' outputs and the left tokens' attention keys and values are computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mosectl.model.architecture import Architecture
from mosectl.model.forward import Batch, attending, hooked, layer_modules, logits_at, stop

# Do cached keys and values give a model's own logits?
_TRUSTED: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()  # by the first layer that is run
AGREES = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative, of log-probabilities
ROUGHLY = 3e-2  # in half precision


@dataclass(frozen=True)
class Below:
    """What the layers below one put out for a batch, all its tokens: whatever changes above does not change that."""

    layers: list[nn.Module]
    output: Any  # of the topmost of them; in it tensors of three dimensions are (B, T, d)
    shared: dict[str, Any]  # keys and values (B, heads, T, head size) that layers above reuse (Gemma 4)

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, arch: Architecture, first: int, batch: Batch, known: Below | None = None) -> Below:
        """Run the layers below ``first`` once, from those on that are ``known``."""
        if known is not None:
            if len(known.layers) == first:
                return known
            every = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
            tokens = torch.arange(batch.input_ids.shape[1], device=every.device).expand_as(batch.input_ids)
            with known.replayed(every, tokens):
                return Below.of(model, arch, first, batch)
        layers = list(layer_modules(model, arch))[:first]
        output, shared = None, {}
        if layers:

            def record(_: nn.Module, __: Any, kwargs: dict[str, Any], out: Any) -> None:
                nonlocal output, shared
                output, shared = out, dict(kwargs.get("shared_kv_states") or {})
                raise stop

            with hooked([layers[-1].register_forward_hook(record, with_kwargs=True)]), suppress(stop):
                model(**batch.kwargs())
        return Below(layers, output, shared)

    def rows(self, index: Tensor) -> Below:
        """Of the sequences of these indices."""
        return replace(
            self,
            output=_mapped(self.output, lambda x: x[index.to(x.device)]),
            shared={kind: _mapped(pair, lambda x: x[index.to(x.device)]) for kind, pair in self.shared.items()},
        )

    @contextmanager
    def replayed(self, rows: Tensor, tokens: Tensor, past: Tensor | None = None) -> Iterator[None]:
        """Inside the block the layers are skipped: what they put out is that of ``rows`` (int64), at those ``tokens``
        (len(rows), T) of theirs; keys and values that are shared, at ``past`` (len(rows), P) before them too.
        """

        def at(x: Tensor) -> Tensor:
            x = x[rows.to(x.device)]
            return _gathered(x, tokens, 1) if x.dim() == 3 else x

        if not self.layers:
            yield
            return
        seen = tokens if past is None else torch.cat([past, tokens], 1)
        replay = _mapped(self.output, at)
        shared = {
            kind: _mapped(pair, lambda x: _gathered(x[rows.to(x.device)], seen, 2))
            for kind, pair in self.shared.items()
        }

        def skip(*_: Any, **kwargs: Any) -> Any:
            if shared:
                kwargs["shared_kv_states"].update(shared)
            return replay

        # Only an own `forward` (accelerate's) has to come back; a plain layer's is its class's.
        own = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = skip  # type: ignore[method-assign]
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward  # type: ignore[method-assign]


def _gathered(x: Tensor, tokens: Tensor, along: int) -> Tensor:
    """x, its first dimension rows, at ``tokens`` (rows, T) of the dimension ``along``."""
    shape = [len(x), *([1] * (along - 1)), tokens.shape[1], *([1] * (x.dim() - along - 1))]
    wanted = [*x.shape[:along], tokens.shape[1], *x.shape[along + 1 :]]
    return x.gather(along, tokens.to(x.device).view(shape).expand(wanted))


def _mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` of every tensor in what a layer puts out."""
    if isinstance(value, tuple | list):
        return type(value)(_mapped(v, f) for v in value)
    return f(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Past:
    """Attention keys and values of the tokens that stay as they are, left-padded to one width."""

    states: list[tuple[Tensor, Tensor] | None]  # by layer: (B, heads, P, head size) each; blank where it is skipped
    tokens: Tensor  # (B, P) which of a row's tokens stand there
    mask: Tensor  # (B, P) which of them are no padding
    still: Tensor  # (B,) how many tokens of each row they stand for
    placed: bool  # the model takes position_ids
    cache: str  # the argument that takes keys and values: "cache", in older transformers "past_key_values"

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, batch: Batch, still: Tensor, below: Below) -> Past:
        """Run the first ``still`` (B,) tokens of each sequence once, from the layers that are not ``below`` on."""
        from transformers import DynamicCache

        P = int(still.max())
        column = torch.arange(P, device=still.device) - (P - still)[:, None]  # (B, P) token number, negative = padding
        tokens = column.clamp_min(0)
        mask = (column >= 0).long()
        cache = DynamicCache()
        taken = inspect.signature(model.forward).parameters
        placed, name = "position_ids" in taken, "cache" if "cache" in taken else "past_key_values"
        place = {"position_ids": tokens} if placed else {}
        every = torch.arange(len(still), device=still.device)
        with below.replayed(every, tokens), logits_at(model, torch.zeros_like(still)[:, None]):
            ids = batch.input_ids.gather(1, tokens)
            model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}, **place)
        pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
        states = [(k, v) if isinstance(k, Tensor) and isinstance(v, Tensor) and k.numel() else None for k, v in pairs]
        skipped, blank = len(below.layers), torch.zeros(len(still), 1, P, 1, device=still.device)
        states += [None] * (skipped - len(states))
        # How long the past is, a model may ask of the first layer.
        states = [pair or (blank, blank) if i < skipped else pair for i, pair in enumerate(states)]
        return Past(states, tokens, mask, still, placed, name)

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

    Below ``first`` every layer is skipped and what layer first−1 put out is handed up instead, for the rows asked.

    Args:
        still: (B,) number of tokens at each row's beginning that nothing moves, and whose logits are not asked; None: none.
        below: what some layers below ``first`` put out for the batch, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        first: int,
        batch: Batch,
        still: Tensor | None = None,
        below: Below | None = None,
    ) -> None:
        self.model = model
        self.below = Below.of(model, arch, first, batch, below)
        self.batch, self.width = batch, batch.input_ids.shape[1]
        self.past: Past | None = None
        self.offset = torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device)
        if still is not None and _serves(model, arch, batch, still, self.below):
            self.use(Past.of(model, batch, still, self.below))

    def use(self, past: Past) -> None:
        """From now on only the tokens behind the past are run."""
        self.past, self.offset, self.batch = past, past.still, _behind(self.batch, past.still)

    def alike(self, rows: Tensor) -> list[Tensor]:
        """``rows`` (int64) in two parts, the shorter and the longer, where that saves a fifth of the tokens; else in one."""
        length = self.batch.attention_mask.sum(1)[rows]
        length, order = length.sort(stable=True)
        n = len(rows)
        below = torch.arange(1, n + 1, device=rows.device)  # rows in the shorter part
        tokens = below * length + (n - below) * length[-1]
        best = int(tokens.argmin())
        if tokens[best] > 0.8 * n * length[-1]:
            return [rows]
        return [rows[order[: best + 1]], rows[order[best + 1 :]]]

    def logits(self, rows: Tensor, positions: Tensor, asked: Tensor) -> Tensor:
        """Logits (K, vocabulary) in float32 at those of ``positions`` (len(rows), m) of the rows ``rows`` (int64) that are
        ``asked`` (len(rows), m), row by row.
        """
        batch = self.batch.rows(rows)
        width = int(batch.attention_mask.sum(1).max())
        batch = Batch(batch.input_ids[:, :width], batch.attention_mask[:, :width])
        at = (positions - self.offset[rows][:, None]).clamp_min(0)  # padding may point before the first token
        tokens = (torch.arange(width, device=rows.device) + self.offset[rows][:, None]).clamp_max(self.width - 1)
        kwargs = self.past.kwargs(rows, batch) if self.past else batch.kwargs()
        past = self.past.tokens[rows] if self.past else None
        quick = attending(self.model, self.width)
        with self.below.replayed(rows, tokens, past), logits_at(self.model, at, asked), quick:
            return self.model(**kwargs).logits[0].float()


def _behind(batch: Batch, still: Tensor) -> Batch:
    """Each row's tokens from number ``still`` on, right-padded."""
    width = int((batch.attention_mask.sum(1) - still).max())
    column = torch.arange(width, device=still.device) + still[:, None]
    inside = column < batch.input_ids.shape[1]
    column = column.clamp_max(batch.input_ids.shape[1] - 1)
    return Batch(batch.input_ids.gather(1, column), batch.attention_mask.gather(1, column) * inside)


def _serves(model: nn.Module, arch: Architecture, batch: Batch, still: Tensor, below: Below) -> bool:
    """Is there a past, and does the model, tried once on a few rows, give the same logits with it?"""
    if not bool(still.any()):
        return False
    trusted, first = _TRUSTED.setdefault(model, {}), len(below.layers)
    if first not in trusted:
        few = still.topk(min(4, len(still))).indices
        trusted[first] = _agrees(model, arch, batch.rows(few), still[few], below.rows(few))
    return trusted[first]


@torch.no_grad()
def _agrees(model: nn.Module, arch: Architecture, batch: Batch, still: Tensor, below: Below) -> bool:
    every, last = torch.arange(len(still), device=still.device), batch.attention_mask.sum(1)[:, None] - 1
    asked = torch.ones_like(last, dtype=torch.bool)
    suffix = Suffix(model, arch, len(below.layers), batch, below=below)
    plain = suffix.logits(every, last, asked).log_softmax(-1)
    try:
        suffix.use(Past.of(model, batch, still, below))
        logits = suffix.logits(every, last, asked)
    except Exception:  # models do all sorts of things with a cache; without it they are only slower
        return False
    limit = AGREES.get(next(model.parameters()).dtype, ROUGHLY)
    return bool((logits.log_softmax(-1) - plain).norm() <= limit * plain.norm())
