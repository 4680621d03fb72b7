"""Asking a model: greedy answers and probabilities, and what an edit changed in them.

Protocol `generation`: greedy decoding from the bare prompt, the answer cut at the first '.', newline or end of text; it
counts when it starts with the expected object, or an alias of it, at a word boundary. Nothing of the answer is shown to
the model (no teacher forcing); see "The Mirage of Model Editing" (arXiv 2502.11177) for why that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mosectl.facts.records import Fact, Probe
from mosectl.measure.bootstrap import Tally
from mosectl.measure.next_tokens import NextTokens, next_tokens, places
from mosectl.measure.own_probes import TOKENS, readable
from mosectl.model.generation import answer, says
from mosectl.model.questions import MAX_NEW_TOKENS, Need, Question, ask
from mosectl.model.scoring import Pair, Scored, encode_pairs, paired, score
from mosectl.model.weights import digest


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
    locality: float | None  # prompts that the edit should leave alone, answered as before it
    facts: int
    rephrasings: int
    locality_prompts: int
    unseen: float | None = (
        None  # generalization over the rephrasings that were not edited along as the model's own wordings
    )
    rephrasings_unseen: int = 0


def target_probabilities(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], *, chat: bool = False, batch_size: int | None = None
) -> list[float]:
    """P(target_new | prompt) of each fact, the product over its tokens."""
    return _probabilities(facts, score(model, encode_pairs(tokenizer, _targets(facts), chat), batch_size=batch_size))


def _targets(facts: Sequence[Fact]) -> list[Pair]:
    return [paired(f, f.prompt, f.target_new) for f in facts]


def _probabilities(facts: Sequence[Fact], scores: Mapping[Pair, Scored]) -> list[float]:
    logs = [scores[pair].logprobs for pair in _targets(facts)]
    return [float(torch.tensor(log).sum().exp()) for log in logs]  # float32, as the logits


@dataclass(frozen=True)
class Interview:
    """Everything asked of one model about some facts: compare two of them with :func:`compare`."""

    answers: tuple[FactAnswer, ...]
    # Per fact, one continuation a rephrasing, as long as it takes to tell whether it says the new object, or the old one.
    rephrased: tuple[tuple[str, ...], ...]
    local: tuple[tuple[str, ...], ...]  # per fact, one continuation a locality prompt, to the end of its answer
    probes: tuple[tuple[Probe, ...], ...] = ()  # per fact, locality prompts of mosectl's own
    own: tuple[tuple[str, ...], ...] = ()  # per fact, one continuation each, to the end of its answer
    next: NextTokens | None = field(default=None, compare=False)  # what comes next, at the ends of some prompts
    conditions: Mapping[str, str] = field(default_factory=dict)  # by prompt, what was said to conditions of probes


@dataclass(frozen=True)
class Talk:
    """All that one model wrote about some facts."""

    interview: Interview
    portable: tuple[tuple[str, ...], ...]  # per fact, one continuation a probe, as long as it takes to judge it
    long: tuple[str, ...]  # per fact, what follows the edit prompt for MAX_NEW_TOKENS tokens; empty if not asked for


def interview(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    chat: bool = False,
    batch_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    probes: Sequence[Sequence[Probe]] = (),
    texts: Sequence[str] = (),
    conditions: Sequence[Probe] = (),
) -> Interview:
    """Ask the edit prompt, the rephrasings and the locality prompts of every fact; within :func:`remembered`, once.

    Args:
        probes: per fact, locality prompts of mosectl's own: :func:`mosectl.measure.own_probes.own_probes`.
        texts: ordinary text, for what comes next in it.
        conditions: of probes (:mod:`mosectl.measure.conditions`), for the model before an edit.
    """
    kept, about = _KEPT.get(), (tuple(facts), chat, tuple(map(tuple, probes)), tuple(texts), tuple(conditions))
    weights = "" if kept is None else digest(model)
    if kept is not None and about in kept and kept[about][0] == weights:
        return kept[about][1]
    scores = score(model, encode_pairs(tokenizer, _targets(facts), chat), batch_size=batch_size)
    how: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "on_step": on_step}
    also: dict[str, Any] = {"probes": probes, "texts": texts, "conditions": conditions}
    found = talk(model, tokenizer, facts, [()] * len(facts), scores, long=False, **how, **also).interview
    if kept is not None:
        kept.setdefault(about, (weights, found))
    return found


# Facts, chat, probes, texts and conditions.
About = tuple[tuple[Fact, ...], bool, tuple[tuple[Probe, ...], ...], tuple[str, ...], tuple[Probe, ...]]
Kept = dict[About, tuple[str, Interview]]  # digest of the weights, and answers
_KEPT: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def remembered(kept: Kept) -> Iterator[None]:
    """Inside the block the first interview about some facts is kept in ``kept``; the same weights are not asked it again.

    For one model (and its tokenizer) that is edited again and again from the same weights.
    """
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


def talk(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    hops: Sequence[Sequence[Probe]],
    scores: Mapping[Pair, Scored],
    *,
    long: bool,
    chat: bool = False,
    batch_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    probes: Sequence[Sequence[Probe]] = (),
    texts: Sequence[str] = (),
    conditions: Sequence[Probe] = (),
) -> Talk:
    """All that is to be written about some facts, in one pass; and what comes next at some places.

    Args:
        hops: per fact, portability prompts whose answers are known.
        scores: of every fact's target at least.
        long: go on with the edit prompts for MAX_NEW_TOKENS tokens, too.
        probes, texts, conditions: as of :func:`interview`.
    """
    how: dict[str, Any] = {"chat": chat, "batch_size": batch_size}
    read = readable(model, tokenizer, probes, chat)
    questions = [*_of_facts(tokenizer, facts), *_of_hops(tokenizer, hops), *_of_hops(tokenizer, [conditions])]
    questions += [Question(p.prompt, TOKENS, Need.ANSWER) for own in read for p in own]
    questions += [Question(f.prompt, MAX_NEW_TOKENS) for f in facts if long]
    said = iter(ask(model, tokenizer, questions, on_step=on_step, **how))
    asked = [next(said) for _ in facts]
    rephrased = tuple(tuple(next(said) for _ in f.rephrase_prompts) for f in facts)
    local = tuple(tuple(next(said) for _ in f.locality) for f in facts)
    portable = tuple(tuple(next(said) for _ in of) for of in hops)
    known = {p.prompt: next(said) for p in conditions}
    own = tuple(tuple(next(said) for _ in of) for of in read)
    answers = tuple(map(FactAnswer, asked, _probabilities(facts, scores)))
    follows = next_tokens(model, tokenizer, places(facts, read, texts), **how)
    return Talk(Interview(answers, rephrased, local, read, own, follows, known), portable, tuple(said))


def edit_prompts(tokenizer: Any, facts: Sequence[Fact]) -> list[Question]:
    """The edit prompts alone, as an interview about these facts asks them."""
    tokens = _room(tokenizer, (t for f in facts for t in _objects(f)), 8)
    return [_edit_prompt(f, tokens) for f in facts]


def _edit_prompt(fact: Fact, tokens: int) -> Question:
    return Question(fact.prompt, tokens, Need.ANSWER, _both(fact))


def _of_facts(tokenizer: Any, facts: Sequence[Fact]) -> Iterator[Question]:
    """The edit prompts, then the rephrasings, then the locality prompts."""
    tokens = _room(tokenizer, (t for f in facts for t in _objects(f)), 8)
    yield from (_edit_prompt(f, tokens) for f in facts)
    for f in facts:
        # Without an old object the answer to the edit prompt tells it (qa.old_object), which is not known yet.
        need = Need.SAYS if f.ground_truth else Need.ALL
        yield from (Question(p, tokens, need, _both(f)) for p in f.rephrase_prompts)
    for f in facts:
        yield from (Question(p.prompt, tokens, Need.ANSWER, frozenset(p.answers or ("",))) for p in f.locality)


def _of_hops(tokenizer: Any, hops: Sequence[Sequence[Probe]]) -> Iterator[Question]:
    tokens = _room(tokenizer, (known for of in hops for p in of for known in p.answers), 0)
    return (Question(p.prompt, tokens, Need.SAYS, frozenset(p.answers)) for of in hops for p in of)


def _room(tokenizer: Any, objects: Iterable[str], default: int) -> int:
    """Tokens that the longest of these objects takes, and two."""
    lengths = (len(tokenizer(" " + t, add_special_tokens=False)["input_ids"]) for t in objects)
    return max(lengths, default=default) + 2


def _both(fact: Fact) -> frozenset[str]:
    """The new object, by all its names, and the old."""
    return frozenset(t for t in (*fact.targets, fact.ground_truth) if t)


def _objects(fact: Fact) -> list[str]:
    return [*_both(fact), *(a for p in fact.locality for a in p.answers)]


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
        Tally.of([says(t, *f.targets) for p, t in zip(f.rephrase_prompts, texts, strict=True) if p not in own])
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
        kept = [same_answer(old, new, *p.answers) for old, new, p in zip(before, local, fact.locality, strict=True)]
    else:
        kept = [says(new, *p.answers) for new, p in zip(local, fact.locality, strict=True) if p.answer]
    return {
        "reliability": Tally.of([says(said, *fact.targets)]),
        "generalization": Tally.of([says(t, *fact.targets) for t in rephrased]),
        "locality": Tally.of(kept),
    }


def same_answer(before: str, after: str, *known: str) -> bool:
    """Is the answer unchanged? If the model gave a known answer before, it must give one again; else the same text."""
    if says(before, *known):
        return says(after, *known)
    return answer(before) == answer(after)
