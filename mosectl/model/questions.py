"""Prompts that a model goes on with greedily, each as far as its answer needs, all in one pass.

Prompts of like length share a batch, so that little of it is padding; a batch ends once every answer in it is told. What
is asked several times is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any

from torch import nn

from mosectl.model.generation import decoded, ended, following, told
from mosectl.model.memory import halving, together
from mosectl.model.positions import check_prompt, prompt_ids, window

MAX_NEW_TOKENS = 50


class Need(IntEnum):
    """How much of a continuation is wanted."""

    SAYS = 0  # until it is clear whether it says what is expected
    ANSWER = 1  # until its answer has ended, too
    ALL = 2  # as many tokens as may be


@dataclass(frozen=True)
class Question:
    """A prompt, and what its continuation is wanted for."""

    prompt: str
    tokens: int  # of the continuation, at most
    need: Need = Need.ALL
    expected: frozenset[str] = frozenset()  # objects that it may be held against

    def told(self, text: str) -> bool:
        """Can a continuation so far be judged, whatever follows?"""
        judged = all(told(text, e) for e in self.expected)
        return self.need < Need.ALL and judged and (self.need < Need.ANSWER or ended(text))

    def joined(self, other: Question) -> Question:
        """One question for both."""
        tokens, need = max(self.tokens, other.tokens), max(self.need, other.need)
        return Question(self.prompt, tokens, need, self.expected | other.expected)


def ask(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    chat: bool = False,
    batch_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Each question's greedy continuation, no longer than its own tokens; special tokens are left out.

    Args:
        batch_size: prompts asked together at most; default: as many as fit.
    Raises:
        UsageError: a prompt is longer than the model can read. NotFinite: its logits are not.
    """
    asked: dict[str, Question] = {}
    for q in questions:
        asked[q.prompt] = asked[q.prompt].joined(q) if q.prompt in asked else q
    ids = {prompt: prompt_ids(tokenizer, prompt, chat) for prompt in asked}
    seen = window(model)
    for prompt, tokens in ids.items():
        check_prompt(seen, prompt, tokens)
    said: dict[str, list[int]] = {}
    for part in _batches(model, list(asked.values()), ids, batch_size):

        def work(start: int, end: int, part: Sequence[Question] = part) -> dict[str, list[int]]:
            return _said(model, tokenizer, part[start:end], ids)

        for _, new in halving(len(part), len(part), work):
            said |= new
            if on_step:
                on_step(len(said), len(asked))
    return decoded(tokenizer, [ids[q.prompt] for q in questions], [said[q.prompt][: q.tokens] for q in questions])


def _batches(
    model: nn.Module, questions: Sequence[Question], ids: Mapping[str, Sequence[int]], batch_size: int | None
) -> Iterator[list[Question]]:
    """Questions that need as much together, the longest first: memory that is short is found out at once."""
    ordered = sorted(questions, key=lambda q: (q.tokens, q.need, -len(ids[q.prompt])))
    for (tokens, _), group in groupby(ordered, key=lambda q: (q.tokens, q.need)):
        alike = list(group)
        while alike:
            size = batch_size or together(model, len(ids[alike[0].prompt]) + tokens, 1)
            yield alike[:size]
            alike = alike[size:]


def _said(
    model: nn.Module, tokenizer: Any, part: Sequence[Question], ids: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    sequences = [ids[q.prompt] for q in part]

    def enough(row: int, new: Sequence[int]) -> bool:
        return part[row].told(decoded(tokenizer, [sequences[row]], [new])[0])

    most = min(max(q.tokens for q in part), MAX_NEW_TOKENS)
    new = following(model, tokenizer, sequences, most, told=enough)
    return dict(zip((q.prompt for q in part), new, strict=True))


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    chat: bool = False,
    batch_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy continuations of ``max_new_tokens`` tokens, one a prompt; arguments and errors as of :func:`ask`."""
    questions = [Question(p, max_new_tokens) for p in prompts]
    return ask(model, tokenizer, questions, chat=chat, batch_size=batch_size, on_step=on_step)
