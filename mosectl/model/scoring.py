"""Text scored by a model that is shown it (teacher forcing): answers token by token, whole sequences as a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosectl.facts.records import Fact
from mosectl.model.forward import Batch, attending, finite, input_device, logits_at
from mosectl.model.memory import together
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


@dataclass(frozen=True)
class Rows:
    """Prompts with their answers, teacher-forced."""

    batch: Batch
    positions: Tensor  # (B, m) where the answers' tokens are predicted
    targets: Tensor  # (B, m) the token expected there, −1 = nothing

    @staticmethod
    def of(encoded: Sequence[Encoded], device: torch.device) -> Rows:
        """Rows of prompts with answers, as :func:`mosectl.model.tokens.encode` gives them."""
        width = max(len(e.input_ids) - e.target_start for e in encoded)
        positions = torch.zeros(len(encoded), width, dtype=torch.long)
        targets = torch.full_like(positions, -1)
        for r, e in enumerate(encoded):
            m = len(e.input_ids) - e.target_start
            positions[r, :m] = torch.arange(
                e.target_start - 1, e.target_start - 1 + m
            )  # position i predicts token i + 1
            targets[r, :m] = torch.tensor(e.input_ids[e.target_start :])
        return Rows(Batch.of([e.input_ids for e in encoded], device), positions.to(device), targets.to(device))

    def part(self, start: int, end: int) -> Rows:
        """Some rows, by their numbers."""
        rows = torch.arange(start, min(end, len(self.targets)), device=self.targets.device)
        return Rows(self.batch.rows(rows), self.positions[rows], self.targets[rows])


def log_probabilities(model: nn.Module, rows: Rows, *, check: bool = False) -> Tensor:
    """At every answer token, row by row, (n, vocabulary), in float32 at least.

    Raises:
        NotFinite: with ``check``, the model's logits there are not.
    """
    quick = attending(model, rows.batch.input_ids.shape[1])
    with logits_at(model, rows.positions, rows.targets >= 0), quick:  # all logits would be large
        logits = model(**rows.batch.kwargs()).logits[0]
    logits = finite(logits, model) if check else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).to(rows.targets.device)


@torch.no_grad()
def score(
    model: nn.Module,
    encoded: Mapping[Pair, Encoded],
    *,
    batch_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[Pair, Scored]:
    """Log-probability and argmax at every token of every answer; pairs of like length share a batch.

    Args:
        batch_size: pairs scored together; default: as many as fit.
    Raises:
        NotFinite: the model's logits there are not.
    """
    order = sorted(encoded, key=lambda pair: -len(encoded[pair].input_ids))
    answer = max((len(e.input_ids) - e.target_start for e in encoded.values()), default=0)
    out: dict[Pair, Scored] = {}
    while len(out) < len(order):
        longest = encoded[order[len(out)]]
        size = batch_size or together(model, len(longest.input_ids), answer)
        pairs = order[len(out) : len(out) + size]
        rows = Rows.of([encoded[pair] for pair in pairs], input_device(model))
        logp = log_probabilities(model, rows, check=True)  # (n, V)
        asked = rows.targets >= 0
        counts, wanted = asked.sum(1).tolist(), rows.targets[asked]
        reached = logp.gather(1, wanted[:, None])[:, 0].split(counts)
        predicted = logp.argmax(-1).split(counts)
        for pair, target, said, likely in zip(pairs, wanted.split(counts), predicted, reached, strict=True):
            out[pair] = Scored(tuple(target.tolist()), tuple(said.tolist()), tuple(likely.tolist()))
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
