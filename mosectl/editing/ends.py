"""The end of an answer's last word: "Rishi Sunakumar" begins with all tokens of "Rishi Sunak" and is not that answer.

The target's tokens alone do not say where its word ends. For facts that the model answers with the target and more letters
of its last word, the end is asked for as well: what goes on with a word must not lead behind the target. Other facts are
edited as if there was no such thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosectl.editing.contexts import Contexts
from mosectl.facts.words import within_word
from mosectl.model.forward import logits_at
from mosectl.model.losses import ENDED, NOTHING

ROWS = 256  # sequences run at once


@torch.no_grad()
def running_on(model: nn.Module, tokenizer: Any, contexts: Contexts) -> Tensor:
    """Which facts (n,) bool the model answers, asked with the bare prompt, with the target and more of its last word."""
    c = contexts
    bare = F.pad(c.fact[1:] != c.fact[:-1], (1, 0), value=True).nonzero().flatten()  # each fact's first row
    out = torch.zeros(len(bare), dtype=torch.bool)
    for part in bare.split(ROWS):
        batch = c.batch.rows(part)
        last = batch.attention_mask.sum(1, keepdim=True) - 1
        targets = F.pad(c.targets[part], (0, 1), value=ENDED)
        asked = F.pad(c.targets[part] >= 0, (0, 1), value=True)
        with logits_at(model, torch.cat([c.positions[part], last], 1), asked):
            said = model(**batch.kwargs()).logits[0].argmax(-1).to(asked.device)
        wrong = (said != targets[asked]) & (targets[asked] != ENDED)
        lost = torch.zeros(len(part), device=wrong.device).index_add(0, asked.nonzero()[:, 0], wrong.float())
        following = said[targets[asked] == ENDED]
        for row in (lost == 0).nonzero().flatten().tolist():
            ids = batch.input_ids[row, : int(last[row]) + 1].tolist()
            out[int(c.fact[part[row]])] = _going_on(tokenizer, ids, [int(following[row])])[0]
    return out


def going_on(tokenizer: Any, size: int) -> Tensor:
    """Which of the tokens (size,) bool go on with a word when they stand behind a letter."""
    found = _going_on(
        tokenizer, tokenizer("a", add_special_tokens=False)["input_ids"], range(min(size, len(tokenizer)))
    )
    return F.pad(torch.tensor(found), (0, size - len(found)))


def _going_on(tokenizer: Any, ids: Sequence[int], tokens: Sequence[int]) -> list[bool]:
    """Which tokens go on with the word that ``ids`` end with."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(list(ids), **how)
    texts = tokenizer.batch_decode([[*ids, token] for token in tokens], **how)
    return [t.startswith(before) and within_word(before[-1:], t[len(before) :][:1]) for t in texts]


def ends_asked(contexts: Contexts, facts: Tensor) -> Contexts:
    """The contexts with the end of the word asked behind the targets of ``facts`` (n,) bool."""
    c = contexts
    rows = (c.is_edit & facts.to(c.fact.device)[c.fact] & ~(c.targets == ENDED).any(1)).nonzero().flatten()
    if not len(rows):
        return c
    positions, targets = F.pad(c.positions, (0, 1)), F.pad(c.targets, (0, 1), value=NOTHING)
    behind = (targets[rows] != NOTHING).sum(1)
    targets[rows, behind] = ENDED
    positions[rows, behind] = c.batch.attention_mask[rows].sum(1) - 1
    return replace(c, positions=positions, targets=targets)
