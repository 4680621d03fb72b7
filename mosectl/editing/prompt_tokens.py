"""What the facts' own prompts add to what must keep still: their tokens before the one that is edited.

An edit at the subject's last token is meant for that token alone. What it does elsewhere hits those most that are like it,
the tokens of names; ordinary text has few of them. Hundreds of edits later it is these tokens, not what was written for a
fact, through which earlier facts and other subjects' answers are lost (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mosectl.editing.contexts import build_contexts
from mosectl.editing.second_moments import BATCH_TOKENS, Moments, keys_of_tokens
from mosectl.facts.records import Fact
from mosectl.model.edit_site import Projection
from mosectl.model.forward import Batch, by_length, frozen, input_device


def add_prompts(
    moments: Moments,
    model: nn.Module,
    tokenizer: Any,
    projections: Sequence[Projection],
    facts: Sequence[Fact],
    weight: float,
    *,
    chat: bool = False,
    last: bool = False,
) -> None:
    """C + ``weight`` · E[k kᵀ] over the tokens before the edited one in all prompts, but for the first of all, on which
    attention rests whatever it is. Prompts that begin alike count once.

    C (p, p) is changed in place: those of all layers together can be most of a machine's memory.

    Args:
        last: the prompt's last token is edited, not the subject's.
    """
    contexts = build_contexts(model, tokenizer, facts, [""], chat=chat, last=last)
    rows = contexts.edit_rows
    read = zip(contexts.batch.input_ids[rows].tolist(), contexts.token[rows].tolist(), strict=True)
    begun = sorted({tuple(ids[:at]) for ids, at in read if at > 1})
    if not begun:
        return
    share = weight / sum(len(ids) - 1 for ids in begun)
    with frozen(model):
        for part in by_length(begun, BATCH_TOKENS):
            batch = Batch.of([begun[i] for i in part], input_device(model))
            keys, mask = keys_of_tokens(model, projections, batch), batch.attention_mask
            number = mask.cumsum(1)[mask.bool()]  # (tokens,) of each in its prompt, from 1
            for name, k in keys.items():
                C, k = moments.C[name], k[(number > 1).to(k.device)]
                C.add_((share * k.T @ k).to(C))
