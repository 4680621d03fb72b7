"""What a model says about a subject of its own accord: sentences that an edit of one fact should leave as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mosectl.editing.contexts import Contexts
from mosectl.facts.records import Fact
from mosectl.model.forward import Batch, input_device
from mosectl.model.generation import BATCH, continuations, seeded
from mosectl.model.positions import window
from mosectl.model.tokens import encode

OPENINGS = ("{}", "{} is", "{} was", "{} has", "{}'s", "The {}", "People in {}", "About {}:")
TOKENS = 12


def own_sentences(
    model: Any, tokenizer: Any, facts: Sequence[Fact], olds: Sequence[str], each: int, *, seed: int = 0
) -> Contexts | None:
    """``each`` sampled sentences a fact, from the subject on, but for those that say the old object."""
    asked = [(i, OPENINGS[j % len(OPENINGS)].format(f.subject)) for i, f in enumerate(facts) for j in range(each)]
    texts: list[str] = []
    with seeded(model, seed):
        for start in range(0, len(asked), BATCH):
            part = [encode(tokenizer, o, facts[i].subject, None).input_ids for i, o in asked[start : start + BATCH]]
            texts += continuations(model, tokenizer, part, TOKENS, sampled=True)
    seen, rows = window(model), []
    for (i, opening), text in zip(asked, texts, strict=True):
        if (olds[i] and olds[i] in text) or not text.strip():
            continue
        e = encode(tokenizer, opening, facts[i].subject, None)
        ids = list(tokenizer(opening + text)["input_ids"])
        if tuple(ids[: e.subject_last + 1]) != tuple(e.input_ids[: e.subject_last + 1]) or seen.refuses(ids):
            continue
        if len(ids) > e.subject_last + 1:
            rows.append((ids, i, e.subject_last))
    if not rows:
        return None
    device, width = input_device(model), max(len(ids) - 1 - at for ids, _, at in rows)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(positions, -1)
    for r, (ids, _, at) in enumerate(rows):
        m = len(ids) - 1 - at
        positions[r, :m] = torch.arange(at, at + m)
        targets[r, :m] = torch.tensor(ids[at + 1 :])
    return Contexts(
        Batch.of([ids for ids, _, _ in rows], device),
        torch.tensor([i for _, i, _ in rows], device=device),
        torch.tensor([at for _, _, at in rows], device=device),
        positions.to(device),
        targets.to(device),
        torch.zeros(len(rows), dtype=torch.bool, device=device),
    )
