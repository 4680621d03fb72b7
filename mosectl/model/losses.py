"""What an answer costs and by how much it leads, teacher-forced: at its tokens, and at the end of its last word."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING, ENDED = -1, -2  # in a target token's place: nothing is asked; any token that does not go on with the word
ENOUGH = 2.0  # nats by which such a token must lead those that go on: which one it is does not matter


def token_nll(logp: Tensor, targets: Tensor, asked: Tensor, going_on: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood a token, (B,), of targets (B, m), NOTHING = none.

    Args:
        logp: (K, vocabulary) at the positions that are ``asked`` (B, m) bool, row by row; all that have a target are.
        going_on: (vocabulary,) bool, tokens that go on with a word: their absence counts as a token where ENDED is asked.
            Without it nothing is asked there.
    """
    wanted = targets[asked]
    found = logp.gather(-1, wanted.clamp_min(0)[:, None]).squeeze(-1) * (wanted >= 0)
    counted = targets >= 0
    if going_on is not None:
        at = (wanted == ENDED).nonzero().flatten()
        found = found.index_add(0, at, logp[at].masked_fill(going_on, -torch.inf).amax(-1))
        counted = targets != NOTHING
    total = torch.zeros(len(targets), device=logp.device, dtype=logp.dtype).index_add(0, asked.nonzero()[:, 0], found)
    return -total / counted.sum(-1).clamp_min(1)


def leads(logp: Tensor, targets: Tensor, asked: Tensor, going_on: Tensor | None = None) -> Tensor:
    """Smallest lead of a target token over its best rival, (B,) nats, arguments as in :func:`token_nll`.

    Where a word shall end, the lead of what ends it over what goes on with it counts, if it is less than ENOUGH.
    """
    wanted = targets[asked]
    index = wanted.clamp_min(0)[:, None]
    rival = logp.scatter(-1, index, -torch.inf).amax(-1)
    lead = torch.where(wanted >= 0, logp.gather(-1, index).squeeze(-1) - rival, torch.inf)
    if going_on is not None:
        at = (wanted == ENDED).nonzero().flatten()
        ends, goes = (logp[at].masked_fill(mask, -torch.inf).amax(-1) for mask in (going_on, ~going_on))
        lead[at] = torch.where(ends - goes < ENOUGH, ends - goes, torch.inf)
    smallest = torch.full((len(targets),), torch.inf, device=logp.device, dtype=logp.dtype)
    return smallest.scatter_reduce(0, asked.nonzero()[:, 0], lead, "amin")
