"""Answers compared as question answering does: case, articles and punctuation aside, and a leading "the city of".

SQuAD's normalisation (arXiv 1606.05250, `normalize_answer` of its evaluate script). A prompt whose right answer nobody knows
is *kept* where the first three words of the greedy answer are those from before: whole answers differ in their last words
for reasons that are no edit's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mosectl.facts.records import Fact
from mosectl.measure.bootstrap import Tally
from mosectl.model.generation import answer
from mosectl.model.generation import says as says_strictly
from mosectl.text.normalised import normalised

KEPT_WORDS = 3
OBJECT_WORDS = 4  # of an object that is taken from an answer, articles aside: what is longer is a sentence
_CLAUSE = re.compile(r"[,;:](?=\s|$)|\s[–—-]\s|\s\(|[，；：、（。]")


def says(text: str, *expected: str) -> bool:
    """Does a greedy continuation start with one of ``expected``, strictly or when both are normalised?"""
    if says_strictly(text, *expected):
        return True
    wanted = [w for e in expected if (w := normalised(e))]
    return bool(wanted) and any(says_strictly(normalised(t), *wanted) for t in (text, answer(text)))


def old_object(fact: Fact, said: str) -> str:
    """The file's old object, else what the unedited model's answer to the prompt begins with, up to its first clause's end
    ("Paris, the capital of France" gives Paris). Empty where that is too long for an object: then it cannot be told.

    Args:
        said: how the unedited model went on with the edit prompt.
    """
    if fact.ground_truth:
        return fact.ground_truth
    first = _CLAUSE.split(answer(said), maxsplit=1)[0].strip()
    return first if 0 < len(normalised(first).split()) <= OBJECT_WORDS else ""


def mentions(text: str, wanted: str) -> bool:
    """Does ``wanted`` stand anywhere in the text, word by word, both normalised?"""
    return bool(words := normalised(wanted)) and f" {words} " in f" {normalised(text)} "


def kept(before: str, after: str, *known: str) -> bool:
    """Is an answer kept? One of the known, where the model gave one of them before; else its first words."""
    if says(before, *known):
        return says(after, *known)
    old, new = (normalised(answer(t)).split()[:KEPT_WORDS] for t in (before, after))
    return old == new


def judge_fact(
    fact: Fact, said: str, rephrased: Sequence[str], local: Sequence[str], before: Sequence[str] | None
) -> dict[str, Tally]:
    """As :func:`mosectl.measure.answers.judge_fact`, compared as QA does."""
    if before is not None:
        hits = [kept(old, new, *p.answers) for old, new, p in zip(before, local, fact.locality, strict=True)]
    else:
        hits = [says(new, *p.answers) for new, p in zip(local, fact.locality, strict=True) if p.answer]
    return {
        "reliability": Tally.of([says(said, *fact.targets)]),
        "generalization": Tally.of([says(t, *fact.targets) for t in rephrased]),
        "locality": Tally.of(hits),
    }
