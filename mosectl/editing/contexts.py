"""The rows a batch of facts is computed on: prompts, prefixes and wordings with their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosectl.errors import FactsError, ModelError, UsageError
from mosectl.facts.records import Fact
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection
from mosectl.model.forward import Batch, hidden_at, input_device, keys_at
from mosectl.model.partial_forward import Below
from mosectl.model.positions import Window, window
from mosectl.model.tokens import Encoded, encode, rendered_already

BY_ROW = ("fact", "token", "positions", "targets", "is_edit")
MOST = 1e9  # bytes of what lower layers put out that are kept for a batch


@dataclass(frozen=True)
class Contexts:
    """One batch of facts as token rows: each fact's prompt behind every prefix, its other wordings, perhaps the reply that
    says it in a chat, "{subject} is a" where its subject is edited.
    """

    batch: Batch
    fact: Tensor  # (B,) which fact a row belongs to
    token: Tensor  # (B,) position of the token whose output is edited: the subject's last, or the prompt's
    positions: Tensor  # (B, m) where logits are read
    targets: Tensor  # (B, m) the token expected there; NOTHING (padding and KL rows) or ENDED (the end of the word)
    is_edit: Tensor  # (B,) True for prompt rows, False for KL rows
    below: Below | None = None  # what the layers put out that lie below the edited ones, once for all that is computed
    least: Tensor | None = None  # (B,) nats by which a row's target tokens shall lead, if not by the options' margin

    @property
    def edit_rows(self) -> Tensor:
        """Numbers of the rows that ask for a new object."""
        return self.is_edit.nonzero().flatten()

    def to(self, device: torch.device) -> Contexts:
        """The same rows on another device."""
        rows = {name: getattr(self, name).to(device) for name in BY_ROW}
        return Contexts(Batch(self.batch.input_ids.to(device), self.batch.attention_mask.to(device)), **rows)

    def above(self, model: nn.Module, arch: Architecture, first: int) -> Contexts:
        """The same rows, for work on a model that changes from layer ``first`` upward: what is below is run here, once."""
        d = arch.projections[first].d * next(model.parameters()).element_size()
        if first == 0 or self.batch.input_ids.numel() * d > MOST:
            return self
        return replace(self, below=Below.of(model, arch, first, self.batch))

    def keys(self, model: nn.Module, projections: Sequence[Projection], rows: Tensor) -> list[Tensor]:
        """Each FFN's inner activation k at the token that is edited, of these rows: (len(rows), p) float32 each."""
        at = self.token[rows]
        with self._replayed(rows, int(at.max()) + 1):
            return keys_at(model, projections, self.batch.rows(rows), at)

    def hidden(self, model: nn.Module, arch: Architecture, layer: int, rows: Tensor) -> Tensor:
        """What decoder layer ``layer`` hands on at the token that is edited, of these rows: (len(rows), d) float32."""
        with self._replayed(rows, self.batch.input_ids.shape[1]):
            return hidden_at(model, arch, layer, self.batch.rows(rows), self.token[rows])

    def _replayed(self, rows: Tensor, end: int) -> AbstractContextManager[None]:
        if self.below is None:
            return nullcontext()
        return self.below.replayed(rows, torch.arange(end, device=rows.device).expand(len(rows), end))

    def followed_by(self, other: Contexts) -> Contexts:
        """These rows, then the other's, whose facts are numbered on."""

        def joined(a: Tensor, b: Tensor, fill: int = 0) -> Tensor:
            width = max(a.shape[1], b.shape[1])
            return torch.cat([F.pad(x, (0, width - x.shape[1]), value=fill) for x in (a, b)])

        a, b = self.batch, other.batch
        return Contexts(
            batch=Batch(joined(a.input_ids, b.input_ids), joined(a.attention_mask, b.attention_mask)),
            fact=torch.cat([self.fact, other.fact + self.fact.max() + 1]),
            token=torch.cat([self.token, other.token]),
            positions=joined(self.positions, other.positions),
            targets=joined(self.targets, other.targets, fill=-1),
            is_edit=torch.cat([self.is_edit, other.is_edit]),
        )


def build_contexts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    wordings: Sequence[Sequence[str]] | None = None,
    *,
    chat: bool = False,
    last: bool = False,
    replies: bool = False,
) -> Contexts:
    """Tokenise ``facts`` behind each prefix ("" first) and in their other wordings; add one "{subject} is a" row a fact.

    With ``last`` it is the prompt's last token that is edited, and nothing is asked about the subject otherwise. With
    ``replies`` there is a row more, in which the prompt is a user's message in a chat and the reply to it says the whole
    sentence; a question (a prompt with "?") gets none, as nobody knows the sentence that answers it.
    Prefixes are shortened, and wordings left out, where the model could not read them with prompt and target.
    """
    seen = window(model)
    rows: list[tuple[Sequence[int], int, int, int, int | None]] = []  # ids, fact, token, first target, last
    for i, fact in enumerate(facts):
        asked = [(prefix, fact.prompt) for prefix in prefixes]
        asked += [("", wording) for wording in (wordings[i] if wordings else ())]
        found = [_row(tokenizer, fact, prompt, prefix, chat, seen) for prefix, prompt in asked]
        found += [_reply(tokenizer, fact, seen)] if replies else []
        for e in (e for e in found if e):
            token = e.target_start - 1 if last else e.subject_last
            rows.append((e.input_ids, i, token, e.target_start, len(e.input_ids)))
        if last:
            continue
        e = encode(tokenizer, f"{fact.subject} is a", fact.subject, None, chat=chat)
        if seen.refuses(e.input_ids):
            e = encode(tokenizer, fact.subject, fact.subject, None, chat=chat)
        rows.append((e.input_ids, i, e.subject_last, len(e.input_ids), None))
    width = max(end - start if end is not None else 1 for _, _, _, start, end in rows)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(positions, -1)
    for r, (ids, _, _, start, end) in enumerate(rows):
        m = end - start if end is not None else 1
        positions[r, :m] = torch.arange(start - 1, start - 1 + m)
        if end is not None:
            targets[r, :m] = torch.tensor(ids[start:end])
    device = input_device(model)
    return Contexts(
        batch=Batch.of([r[0] for r in rows], device),
        fact=torch.tensor([r[1] for r in rows], device=device),
        token=torch.tensor([r[2] for r in rows], device=device),
        positions=positions.to(device),
        targets=targets.to(device),
        is_edit=torch.tensor([r[4] is not None for r in rows], device=device),
    )


def _row(tokenizer: Any, fact: Fact, prompt: str, prefix: str, chat: bool, seen: Window) -> Encoded | None:
    """Prefix + prompt + target, the prefix without as many of its first words as it takes; None: nothing of it fits."""
    words = prefix.split(" ")
    for n in range(len(words)):
        rest = " ".join(words[n:])
        if prefix and not rest.strip():
            break
        e = encode(
            tokenizer, prompt, fact.subject, fact.target_new,
            chat=chat, prefix=rest, space=fact.space_before_target,
        )  # fmt: skip
        if not (what := seen.refuses(e.input_ids)):
            return e
        if not prefix and prompt == fact.prompt:
            raise FactsError(f"the prompt {what} (with its target)", where=fact.source, fix="shorten it")
    return None


def _reply(tokenizer: Any, fact: Fact, seen: Window) -> Encoded | None:
    """A chat in which the reply to the prompt is the whole sentence; None for a question, a prompt that is a rendered
    template, or where it cannot be written or read: the text is edited all the same.
    """
    if "?" in fact.prompt or rendered_already(tokenizer, fact.prompt):
        return None
    how: dict[str, Any] = {"chat": True, "reply": True, "space": fact.space_before_target}
    with suppress(FactsError, ModelError, UsageError):
        e = encode(tokenizer, fact.prompt, fact.subject, fact.target_new, **how)
        return None if seen.refuses(e.input_ids) else e
    return None


def rows_of(c: Contexts, rows: Tensor, first_fact: int = 0) -> Contexts:
    """Some rows of the contexts, their facts numbered from ``first_fact``."""
    return Contexts(
        batch=c.batch.rows(rows),
        fact=c.fact[rows] - first_fact,
        token=c.token[rows],
        positions=c.positions[rows],
        targets=c.targets[rows],
        is_edit=c.is_edit[rows],
        below=c.below and c.below.rows(rows),
        least=None if c.least is None else c.least[rows],
    )


def first_rows(fact: Tensor) -> Tensor:
    """Numbers of the rows with which the facts begin, of rows (rows,) in the order of their facts: the bare prompts'."""
    return torch.cat([fact.new_ones(1, dtype=torch.bool), fact[1:] != fact[:-1]]).nonzero().flatten()
