"""Shares with their intervals: what every protocol says of all prompts, and of each part of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mosectl.facts.records import Fact
from mosectl.measure.bootstrap import Measure, Tally, measure
from mosectl.measure.groups import GREEDY, KNOWN, Part, parts, prompts_of, tallies
from mosectl.measure.protocols import METRICS, Answers
from mosectl.model.generation import says
from mosectl.patch.record import HOLDS, PatchFact

Judged = dict[str, list[Tally]]  # by "protocol.metric", one a fact


@dataclass(frozen=True)
class Metric:
    """One share under one protocol; None where nothing was asked, recorded, or can be known."""

    protocol: str
    name: str  # of METRICS
    before: Measure | None
    right_after: Measure | None  # recorded by the patches; reliability under `generation` only
    after: Measure | None
    asked: int  # prompts judged
    group: str = ""  # of probes, or groups.KNOWN; "": all prompts
    own: bool = False  # probes of mosectl's own

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"  {Part(self.name, self.group, self.own).label()}" if self.group else self.name


@dataclass(frozen=True)
class Sides:
    """What was answered by the model now and by that from before the edit."""

    now: Sequence[Answers]
    before: Sequence[Answers] | None


def held(record: PatchFact) -> bool:
    """Did a fact hold right after its edit: its own batch, or where that was not recorded the run that made the patch?"""
    if record.right_after is None:
        return record.status in HOLDS
    return says(record.right_after, *record.targets)


def metrics(
    facts: Sequence[Fact],
    protocols: Sequence[str],
    judged: tuple[Judged | None, Judged],
    records: Sequence[PatchFact | None],
    sides: Sides,
    neighbours: Collection[int],
) -> Iterator[Metric]:
    """Every metric of every protocol, each followed by its parts that have a prompt."""
    then = measure([Tally(float(held(r)), 1.0) for r in records if r])
    found = parts(facts, sides.before, neighbours)
    for protocol in protocols:
        for name in METRICS:
            key = f"{protocol}.{name}"
            before = measure(judged[0][key]) if judged[0] else None
            right_after = then if key == "generation.reliability" else None
            asked = sum(prompts_of(protocol, name, f, t) for f, t in zip(facts, judged[1][key], strict=True))
            yield Metric(protocol, name, before, right_after, measure(judged[1][key]), asked)
            for part in found:
                if part.metric == name and (of := _of_part(protocol, part, facts, sides, neighbours)):
                    yield of


def _of_part(
    protocol: str, part: Part, facts: Sequence[Fact], sides: Sides, neighbours: Collection[int]
) -> Metric | None:
    if part.group == KNOWN and protocol not in GREEDY:
        return None  # what the model knew is what it answered
    after, asked = tallies(protocol, part, facts, sides.now, sides.before, neighbours)
    if not asked:
        return None
    before = None
    if sides.before:
        before = measure(tallies(protocol, part, facts, sides.before, sides.before, neighbours)[0])
    return Metric(protocol, part.metric, before, None, measure(after), asked, part.group, part.own)
