"""Conditions of probes: what the model has to know before an edit, so that a probe which builds on it tells of the edit.

RippleEdits' rule (arXiv 2307.12976, src/testrunner.py): a probe counts only if the unedited model answers all its conditions
rightly. Rightly means here under every protocol: its greedy answer gives one of the answers, compared as QA does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mosectl.facts.probe import NotCounted, Probe
from mosectl.facts.records import Fact
from mosectl.measure import qa
from mosectl.measure.answers import Interview
from mosectl.measure.protocols import Answers, portable_probes

LOCALITY = ("locality",)  # what an interview asks
BOTH = ("locality", "portability")


def _probes(fact: Fact, metric: str) -> Sequence[Probe]:
    """Those that are asked, in the order of their answers."""
    return fact.locality if metric == "locality" else portable_probes(fact)


def conditions(facts: Sequence[Fact], metrics: Sequence[str]) -> list[Probe]:
    """All conditions of the probes of these metrics, each once."""
    return list(dict.fromkeys(n for f in facts for m in metrics for p in _probes(f, m) for n in p.needs))


@dataclass(frozen=True)
class Counting:
    """Which probes of some facts count."""

    facts: tuple[Fact, ...]  # with these alone
    kept: Mapping[str, tuple[tuple[int, ...], ...]]  # by metric, for each fact the numbers of these among those asked
    left_out: tuple[NotCounted, ...]

    def interview(self, found: Interview) -> Interview:
        """What an interview about all probes heard of those that count."""
        return replace(found, local=tuple(map(_picked, found.local, self.kept["locality"])))

    def answers(self, found: Sequence[Answers]) -> tuple[Answers, ...]:
        """Of each fact what one model answered to the probes that count."""
        asked = zip(found, self.kept["locality"], self.kept["portability"], strict=True)
        return tuple(replace(a, local=_picked(a.local, x), portable=_picked(a.portable, y)) for a, x, y in asked)

    def recorded(self) -> dict[str, list[dict[str, Any]]]:
        """For a record, which says nothing where nothing was left out."""
        return {"not_counted": [asdict(n) for n in self.left_out]} if self.left_out else {}


def counting(facts: Sequence[Fact], said: Mapping[str, str] | None, metrics: Sequence[str]) -> Counting:
    """Which of the probes of these metrics count.

    Args:
        said: by prompt, what the unedited model said to their conditions; None: there is no such model, and all count.
    """

    def counts(probe: Probe) -> bool:
        return said is None or all(qa.says(said[n.prompt], *n.answers) for n in probe.needs)

    kept = {m: tuple(tuple(i for i, p in enumerate(_probes(f, m)) if counts(p)) for f in facts) for m in metrics}

    def left(number: int, fact: Fact) -> Fact:
        probes: dict[str, Any] = {m: _picked(_probes(fact, m), kept[m][number]) for m in metrics}
        return replace(fact, **probes)

    counted = tuple(left(i, f) for i, f in enumerate(facts))
    return Counting(counted, kept, tuple(n for m in metrics for n in _left_out(facts, counted, m)))


def _picked(values: Sequence[Any], which: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[i] for i in which)


def _left_out(facts: Sequence[Fact], counted: Sequence[Fact], metric: str) -> Iterator[NotCounted]:
    """Of all prompts of a metric, then of each group, what does not count; nothing where all do."""
    of, count = (Counter(p.group for f in some for p in _probes(f, metric)) for some in (facts, counted))
    if lost := of.total() - count.total():
        yield NotCounted(metric, "", lost, of.total())
    yield from (NotCounted(metric, g, n - count[g], n) for g, n in of.items() if g and count[g] < n)
