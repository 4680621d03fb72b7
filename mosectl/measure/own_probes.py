"""Probes of mosectl's own, where a facts file has none: what the model says about the subject otherwise."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from torch import nn

from mosectl.facts.groups import SAME_SUBJECT
from mosectl.facts.records import Fact, Probe
from mosectl.facts.words import gap
from mosectl.measure.qa import mentions, old_object
from mosectl.model.generation import answer
from mosectl.model.positions import prompt_ids, window

MOST_FACTS = 50  # that are asked: each prompt costs a generation on both sides
TOKENS = 8  # of an answer
_OPENINGS = ("is", "was", "has", "is known for")

Probes = tuple[tuple[Probe, ...], ...]  # of each fact
T = TypeVar("T")


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spaced."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def own_probes(facts: Sequence[Fact], chat: bool) -> Probes:
    """Same-subject prompts for facts whose file names no such group, for the first about each subject; none in a chat, in
    scripts without spaces, nor where the whole prompt is the subject.
    """
    none: Probes = ((),) * len(facts)
    if chat or any(p.group == SAME_SUBJECT for f in facts for p in f.locality):
        return none
    first: dict[str, int] = {}  # of the facts about a subject: a prompt is asked once
    for i, f in enumerate(facts):
        if gap(f.subject, "is") and f.subject != f.prompt:
            first.setdefault(f.subject.casefold(), i)
    asked = {*spread([*first.values()], MOST_FACTS)}
    return tuple(_of(f) if i in asked else () for i, f in enumerate(facts))


def _of(fact: Fact) -> tuple[Probe, ...]:
    given = {fact.prompt, *fact.rephrase_prompts, *(p.prompt for p in fact.locality)}
    prompts = [f"{fact.subject} {opening}" for opening in _OPENINGS]
    return tuple(Probe(p, None, SAME_SUBJECT) for p in prompts if p not in given)


def readable(model: nn.Module, tokenizer: Any, probes: Sequence[Sequence[Probe]], chat: bool) -> Probes:
    """Those of the probes that the model can read."""
    seen = window(model)
    return tuple(tuple(p for p in own if not seen.refuses(prompt_ids(tokenizer, p.prompt, chat))) for own in probes)


def objects_by_subject(facts: Sequence[Fact], said: Sequence[str]) -> list[frozenset[str]]:
    """For each fact the old and new objects of all facts about its subject.

    Args:
        said: what the model said to each edit prompt before the edit.
    """
    objects: dict[str, set[str]] = {}
    for fact, text in zip(facts, said, strict=True):
        objects.setdefault(fact.subject.casefold(), set()).update((old_object(fact, text), *fact.targets))
    whole = {subject: frozenset(found) for subject, found in objects.items()}
    return [whole[f.subject.casefold()] for f in facts]


def counts(objects: Collection[str], before: str) -> bool:
    """Does a probe of our own, which the model answered so ``before`` the edit, watch something else than these objects?"""
    heard = answer(before)  # what follows it was not asked for
    return bool(heard) and not any(mentions(heard, o) for o in objects)


def made(facts: Sequence[Fact]) -> str:
    """That the same-subject prompts are ours, in words."""
    first = facts[0].subject
    some = f" (of {MOST_FACTS} facts)" if len(facts) > MOST_FACTS else ""
    prompts = ", ".join(f"'{first} {opening}'" for opening in _OPENINGS[:2])
    return (
        f"the same-subject prompts are mosectl's own{some}, as the facts name none: {prompts} and the like, where the model "
        "did not say the old or new object of a fact about the subject before"
    )
