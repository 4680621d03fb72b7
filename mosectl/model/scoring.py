"""Text scored by a model that is shown it (teacher forcing): answers token by token, whole sequences as a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mosectl.facts.records import Fact
from mosectl.model.forward import Batch, finite, input_device, logits_at
from mosectl.model.tokens import Encoded, encode

# Prompt, answer, and whether a space stands between, where a fact says so.
Pair = tuple[str, str] | tuple[str, str, bool]


@dataclass(frozen=True)
class Scored:
    """An answer's tokens, teacher-forced after its prompt in one forward."""

    target: tuple[int, ...]
    predicted: tuple[int, ...]  # argmax at the same positions
    logprobs: tuple[float, ...]  # of the target's tokens, nats

    @property
    def hits(self) -> int:
        """How many tokens of the target were predicted."""
        return sum(a == b for a, b in zip(self.target, self.predicted, strict=True))

    @property
    def accuracy(self) -> float:
        """The share of the target's tokens that were predicted."""
        return self.hits / len(self.target)

    @property
    def nll(self) -> float:
        """Mean over tokens, nats."""
        return -sum(self.logprobs) / len(self.logprobs)


def paired(fact: Fact, prompt: str, answer: str) -> Pair:
    """An answer to one of the fact's prompts, joined as the fact says."""
    return (prompt, answer) if fact.space_before_target is None else (prompt, answer, fact.space_before_target)


def encode_pair(tokenizer: Any, pair: Pair, chat: bool = False) -> Encoded:
    """Raises FactsError, ModelError, UsageError as :func:`mosectl.model.tokens.encode`."""
    return encode(tokenizer, pair[0], None, pair[1], chat=chat, space=pair[2] if len(pair) == 3 else None)


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], chat: bool = False) -> dict[Pair, Encoded]:
    """Each different pair as tokens: apart from scoring, so that what cannot be written is told before the work.

    Raises:
        FactsError, ModelError, UsageError: as :func:`mosectl.model.tokens.encode`.
    """
    return {pair: encode_pair(tokenizer, pair, chat) for pair in dict.fromkeys(pairs)}


@torch.no_grad()
def score(
    model: nn.Module,
    encoded: Mapping[Pair, Encoded],
    *,
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[Pair, Scored]:
    """Log-probability and argmax at every token of every answer; pairs of like length share a batch.

    Raises:
        NotFinite: the model's logits there are not.
    """
    order = sorted(encoded, key=lambda pair: len(encoded[pair].input_ids))
    out: dict[Pair, Scored] = {}
    for start in range(0, len(order), batch_size):
        pairs = order[start : start + batch_size]
        rows = [encoded[pair] for pair in pairs]
        spans = [range(e.target_start - 1, len(e.input_ids) - 1) for e in rows]  # position i predicts token i + 1
        widest = max(map(len, spans))
        positions = torch.tensor([[*s, *[s[-1]] * (widest - len(s))] for s in spans])
        batch = Batch.of([e.input_ids for e in rows], input_device(model))
        with logits_at(model, positions):  # all of them would be large
            logits = model(**batch.kwargs()).logits
        logp = F.log_softmax(finite(logits, model).float(), dim=-1)  # (B, widest, V)
        predicted = logp.argmax(dim=-1).tolist()
        wanted = torch.zeros_like(positions)
        for i, e in enumerate(rows):
            wanted[i, : len(spans[i])] = torch.tensor(e.input_ids[e.target_start :])
        reached = logp.gather(2, wanted.to(logp.device)[..., None])[..., 0].tolist()
        for i, (pair, e) in enumerate(zip(pairs, rows, strict=True)):
            n = len(spans[i])
            out[pair] = Scored(e.input_ids[e.target_start :], tuple(predicted[i][:n]), tuple(reached[i][:n]))
        if on_step:
            on_step(len(out), len(order))
    return out


@torch.no_grad()
def sequence_nll(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Summed negative log-likelihood, nats, of each token sequence but its first token, in one forward."""
    batch = Batch.of(sequences, input_device(model))
    logits = model(**batch.kwargs()).logits[:, :-1].float()
    labels = batch.input_ids[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (loss * batch.attention_mask[:, 1:].to(loss)).double().sum(-1).tolist()
