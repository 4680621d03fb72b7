"""What comes next, before and after: divergence and agreement of next-token distributions, free of whole strings' noise.

A greedy answer is all or nothing, and one changed comma moves what follows; the distribution of one token says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.facts.records import Fact
from mosectl.measure.bootstrap import Measure, Tally, measure
from mosectl.measure.own_probes import Probes, spread
from mosectl.model.forward import Batch, finite, input_device, logits_at
from mosectl.model.memory import together
from mosectl.model.positions import prompt_ids, window

MOST = 256  # locality prompts whose distributions are kept: each is a row as long as the vocabulary
TEXTS = 24  # beginnings of ordinary text
WORDS = 16  # of each
LEAST = -1e4  # a token that is ruled out, nats


@dataclass(frozen=True)
class Place:
    """Where a distribution was taken: the end of a locality prompt, or of a piece of ordinary text."""

    of: str  # "locality" or "text"
    group: str
    own: bool  # of mosectl's own
    unit: int  # the fact's or text's number
    at: int  # the prompt's number among those of its fact
    prompt: str


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Log-probabilities of what follows, on the CPU."""

    places: tuple[Place, ...]
    logprobs: Tensor  # (n, V) float32


@dataclass(frozen=True)
class NextToken:
    """How far what comes next has moved at the prompts of one group, or in ordinary text."""

    of: str  # "locality" or "text"
    group: str  # "": the file names none
    own: bool  # probes of mosectl's own
    prompts: int
    kl: Measure  # nats, of the distribution before from that after
    top1: Measure  # share of prompts whose likeliest token is the same


def places(facts: Sequence[Fact], own: Probes, texts: Sequence[str]) -> list[Place]:
    """Some prompts of every group, and beginnings of some texts."""
    groups: dict[tuple[str, bool], list[Place]] = {}
    for i, fact in enumerate(facts):
        for mine, probes in ((False, fact.locality), (True, own[i] if own else ())):
            for at, p in enumerate(probes):
                groups.setdefault((p.group, mine), []).append(Place("locality", p.group, mine, i, at, p.prompt))
    each = max(1, MOST // max(1, len(groups)))
    pieces = [" ".join(words[:WORDS]) for t in texts if len(words := t.split()) > 2]
    return [
        *(place for found in list(groups.values())[:MOST] for place in spread(found, each)),
        *(Place("text", "", False, i, 0, piece) for i, piece in enumerate(spread(pieces, TEXTS))),
    ]


@torch.no_grad()
def next_tokens(
    model: nn.Module, tokenizer: Any, wanted: Sequence[Place], *, chat: bool = False, batch_size: int | None = None
) -> NextTokens:
    """The distributions at these places; a place that the model cannot read is left out.

    Args:
        batch_size: prompts read together; default: as many as fit.
    Raises:
        NotFinite: the model's logits there are not.
    """
    seen, device = window(model), input_device(model)
    ids = [(p, list(prompt_ids(tokenizer, p.prompt, chat and p.of != "text"))) for p in wanted]
    ids = [(p, tokens) for p, tokens in ids if not seen.refuses(tokens)]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i][1]))  # those of like length together
    rows: dict[int, Tensor] = {}
    while len(rows) < len(order):
        size = batch_size or together(model, len(ids[order[len(rows)]][1]), 1)
        which = order[len(rows) : len(rows) + size]
        part = [ids[i][1] for i in which]
        batch, ends = Batch.of(part, device), torch.tensor([[len(tokens) - 1] for tokens in part], device=device)
        with logits_at(model, ends):
            logits = finite(model(**batch.kwargs()).logits[:, 0], model)
        rows |= zip(which, logits.float().log_softmax(-1).cpu(), strict=True)
    found = [rows[i] for i in range(len(ids))]
    return NextTokens(tuple(p for p, _ in ids), torch.stack(found) if found else torch.zeros(0, 1))


def compare_next(
    before: NextTokens, after: NextTokens, counted: Callable[[Place], bool] = lambda place: True
) -> tuple[NextToken, ...]:
    """KL and agreement by group, in the order of the places; nothing where the two sides have other vocabularies.

    Args:
        counted: which places shall count.
    """
    if before.places != after.places or before.logprobs.shape != after.logprobs.shape:
        return ()
    groups: dict[tuple[str, str, bool], dict[int, list[int]]] = {}
    for row, p in enumerate(before.places):
        if counted(p):
            groups.setdefault((p.of, p.group, p.own), {}).setdefault(p.unit, []).append(row)
    old, new = (side.logprobs.double().clamp(min=LEAST) for side in (before, after))
    kl = (old.exp() * (old - new)).sum(-1).clamp(min=0).tolist()
    same = (old.argmax(-1) == new.argmax(-1)).tolist()
    out = []
    for (of, group, own), units in groups.items():
        told = [
            measure([Tally(float(sum(values[r] for r in rows)), float(len(rows))) for rows in units.values()])
            for values in (kl, same)
        ]
        moved, kept = told
        assert moved and kept
        if not moved.value:  # Wilson's interval is for shares
            moved = Measure(0.0, 0.0, 0.0, moved.units)
        out.append(NextToken(of, group, own, sum(map(len, units.values())), moved, kept))
    return tuple(out)
