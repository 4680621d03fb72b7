"""Asking a model: greedy answers and probabilities, and what an edit changed in them.

Protocol `generation`: greedy decoding from the bare prompt, the answer cut at the first '.', newline or end of text; it
counts when it starts with the expected object at a word boundary. Nothing of the answer is shown to the model
(no teacher forcing); see "The Mirage of Model Editing" (arXiv 2502.11177) for why that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mosectl.facts.records import Fact, Probe
from mosectl.measure.bootstrap import Tally
from mosectl.measure.next_tokens import NextTokens, next_tokens, places
from mosectl.measure.own_probes import ask_own
from mosectl.model.generation import answer, generate, says
from mosectl.model.scoring import encode_pairs, paired, score


@dataclass(frozen=True)
class FactAnswer:
    """One fact asked once: greedy text, and the probability of the new target given the prompt."""

    text: str
    probability: float  # exp of the summed log-probability of the target's tokens


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1 under the protocol `generation`; None where there was nothing to ask."""

    protocol: str
    reliability: float | None  # edit prompts answered with the new target
    generalization: float | None  # rephrased prompts answered with the new target
    locality: float | None  # unrelated prompts answered as before the edit
    facts: int
    rephrasings: int
    locality_prompts: int
    unseen: float | None = (
        None  # generalization over the rephrasings that were not edited along as the model's own wordings
    )
    rephrasings_unseen: int = 0


def target_probabilities(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], *, chat: bool = False, batch_size: int = 64
) -> list[float]:
    """P(target_new | prompt) of each fact, the product over its tokens."""
    pairs = [paired(f, f.prompt, f.target_new) for f in facts]
    scores = score(model, encode_pairs(tokenizer, pairs, chat), batch_size=batch_size)
    return [float(torch.tensor(scores[pair].logprobs).sum().exp()) for pair in pairs]  # float32, as the logits


@dataclass(frozen=True)
class Interview:
    """Everything asked of one model about some facts: compare two of them with :func:`compare`."""

    answers: tuple[FactAnswer, ...]
    rephrased: tuple[tuple[str, ...], ...]  # per fact, one continuation a rephrasing
    local: tuple[tuple[str, ...], ...]  # per fact, one continuation a locality prompt
    probes: tuple[tuple[Probe, ...], ...] = ()  # per fact, locality prompts of mosectl's own
    own: tuple[tuple[str, ...], ...] = ()  # per fact, one continuation each
    next: NextTokens | None = field(default=None, compare=False)  # what comes next, at the ends of some prompts


def interview(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    chat: bool = False,
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
    probes: Sequence[Sequence[Probe]] = (),
    texts: Sequence[str] = (),
) -> Interview:
    """Ask the edit prompt, the rephrasings and the locality prompts of every fact.

    Args:
        probes: per fact, locality prompts of mosectl's own: :func:`mosectl.measure.own_probes.own_probes`.
        texts: ordinary text, for what comes next in it.
    """
    prompts = [f.prompt for f in facts]
    prompts += [p for f in facts for p in f.rephrase_prompts]
    prompts += [probe.prompt for f in facts for probe in f.locality]
    longest = max(
        (len(tokenizer(" " + t, add_special_tokens=False)["input_ids"]) for f in facts for t in _objects(f)),
        default=8,
    )
    how: dict[str, Any] = {"chat": chat, "batch_size": batch_size}
    said = iter(generate(model, tokenizer, prompts, max_new_tokens=longest + 2, on_step=on_step, **how))
    asked = [next(said) for _ in facts]
    rephrased = tuple(tuple(next(said) for _ in f.rephrase_prompts) for f in facts)
    local = tuple(tuple(next(said) for _ in f.locality) for f in facts)
    p = target_probabilities(model, tokenizer, facts, **how)
    read, own = ask_own(model, tokenizer, probes, **how)
    follows = next_tokens(model, tokenizer, places(facts, read, texts), **how)
    return Interview(tuple(map(FactAnswer, asked, p)), rephrased, local, read, own, follows)


def _objects(fact: Fact) -> list[str]:
    return [t for t in (fact.target_new, fact.ground_truth, *(p.answer for p in fact.locality)) if t]


def compare(
    facts: Sequence[Fact], before: Interview, after: Interview, wordings: Sequence[Sequence[str]] | None = None
) -> Scores:
    """Reliability, generalization and locality under the protocol `generation`.

    Args:
        wordings: per fact, other prompts that were edited along with it.
    """

    def share(tallies: Sequence[Tally]) -> tuple[float | None, int]:
        asked = sum(t.weight for t in tallies)
        return sum(t.total for t in tallies) / asked if asked else None, int(asked)

    (reliability, n), (generalization, m), (locality, k) = map(share, judge(facts, before, after).values())
    other, o = share(unseen(facts, after.rephrased, wordings or [()] * len(facts)))
    return Scores("generation", reliability, generalization, locality, n, m, k, other, o)


def unseen(facts: Sequence[Fact], rephrased: Sequence[Sequence[str]], wordings: Sequence[Sequence[str]]) -> list[Tally]:
    """Generalization of each fact over its rephrasings that are not among ``wordings``, edited along with the prompt.

    Args:
        rephrased: the continuations of each fact's rephrasings.
    """
    return [
        Tally.of([says(t, f.target_new) for p, t in zip(f.rephrase_prompts, texts, strict=True) if p not in own])
        for f, texts, own in zip(facts, rephrased, wordings, strict=True)
    ]


def judge(facts: Sequence[Fact], before: Interview, after: Interview) -> dict[str, list[Tally]]:
    """:func:`judge_fact` of every fact, by metric."""
    asked = zip(facts, after.answers, after.rephrased, after.local, before.local, strict=True)
    judged = [judge_fact(f, said.text, rephrased, local, old) for f, said, rephrased, local, old in asked]
    return {name: [tallies[name] for tallies in judged] for name in ("reliability", "generalization", "locality")}


def judge_fact(
    fact: Fact, said: str, rephrased: Sequence[str], local: Sequence[str], before: Sequence[str] | None
) -> dict[str, Tally]:
    """Hits of one fact's prompts under the protocol `generation`, by metric.

    Args:
        before: the locality prompts' continuations before the edit; without them the known answers are expected.
    """
    if before is not None:
        kept = [same_answer(old, new, p.answer) for old, new, p in zip(before, local, fact.locality, strict=True)]
    else:
        kept = [says(new, p.answer) for new, p in zip(local, fact.locality, strict=True) if p.answer]
    return {
        "reliability": Tally.of([says(said, fact.target_new)]),
        "generalization": Tally.of([says(t, fact.target_new) for t in rephrased]),
        "locality": Tally.of(kept),
    }


def same_answer(before: str, after: str, known: str | None) -> bool:
    """Is the answer unchanged? If the model gave the known answer before, it must give it again; else the same text."""
    if known and says(before, known):
        return says(after, known)
    return answer(before) == answer(after)
