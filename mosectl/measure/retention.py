"""What is left of facts by their place in a run: a curve over the run, and its oldest, middle and newest facts.

"Right after" is the greedy answer when a fact's own batch was done, "after" what the model says with every edit in it. How
the prompts around a fact were answered right after its batch nobody has asked: of these only the end is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mosectl.facts.groups import NEIGHBOURS, SAME_SUBJECT
from mosectl.facts.records import Fact
from mosectl.measure.bootstrap import Measure, Tally, measure
from mosectl.measure.groups import KNOWN, Part, parts, tallies
from mosectl.measure.protocols import Answers
from mosectl.model.generation import says
from mosectl.patch.record import HOLDS, PatchFact

BINS = 20
LEAST_RUN, LEAST = 30, 10  # facts of a run that has cohorts, and of a cohort
LARGE_RUN, LARGE = 300, 100  # facts from which on a cohort is no longer a tenth of the run, and its facts then

AROUND = (KNOWN, NEIGHBOURS, SAME_SUBJECT)  # parts of the prompts that are told by cohort


@dataclass(frozen=True)
class Bin:
    """Facts first … last (from 1) and the share of them that holds under `generation`."""

    first: int
    last: int
    right_after: float | None  # of those of which it is known
    after: float


@dataclass(frozen=True)
class CohortPart:
    """A part of the prompts around a cohort's facts, at the end, under `qa`."""

    metric: str
    group: str  # groups.KNOWN, neighbours or same subject
    own: bool  # probes of mosectl's own
    asked: int  # prompts
    after: Measure


@dataclass(frozen=True)
class Cohort:
    """Facts first … last of a run (from 1, in the order of the edit), and what is left of them."""

    name: str  # "oldest", "middle" or "newest"
    first: int
    last: int
    right_after: Measure | None  # reliability under `generation` right after their own batch; None: not known
    after: Measure  # the same with all edits
    kept: Measure | None  # of the facts that held right after, the share that holds with all edits
    parts: tuple[CohortPart, ...]

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.name} {self.first}-{self.last}"


def curve(holds: Sequence[bool], then: Sequence[bool | None], of: int = 0, least: int = 1) -> tuple[Bin, ...]:
    """At most BINS bins of equal size (the last may be smaller).

    Args:
        holds, then: of each fact in order, whether it holds, and whether it did right after its edit (None: not known).
        of: facts that bins are made for, where a run has ended before it had edited all.
        least: facts of a bin.
    """
    size = max(least, -(-max(len(holds), of) // BINS))
    out = []
    for start in range(0, len(holds), size):
        part, known = holds[start : start + size], [t for t in then[start : start + size] if t is not None]
        share = sum(known) / len(known) if known else None
        out.append(Bin(start + 1, start + len(part), share, sum(part) / len(part)))
    return tuple(out)


def places(n: int) -> dict[str, range]:
    """Numbers (from 0) of the facts of each cohort in a run of ``n``; none in a small one."""
    if n < LEAST_RUN:
        return {}
    size = LARGE if n >= LARGE_RUN else max(LEAST, n // 10)
    starts = {"oldest": 0, "middle": (n - size) // 2, "newest": n - size}
    return {name: range(start, start + size) for name, start in starts.items()}


def cohorts(
    facts: Sequence[Fact],
    right_after: Sequence[str | None],
    now: Sequence[Answers],
    before: Sequence[Answers] | None,
) -> tuple[Cohort, ...]:
    """The oldest, middle and newest facts of a run; none where it is small.

    Args:
        facts: in the order of the edit.
        right_after: of each fact the answer right after its own batch; None: not known.
        now, before: what was answered about each with all edits, and before any.
    """
    where = places(len(facts))
    holds = [says(a.said, *f.targets) for f, a in zip(facts, now, strict=True)]
    then = [None if t is None else says(t, *f.targets) for f, t in zip(facts, right_after, strict=True)]
    asked = [p for p in parts(facts, before) if p.group in AROUND and where]
    around = {p: tallies("qa", p, facts, now, before)[0] for p in asked}
    return tuple(_cohort(name, place, holds, then, around) for name, place in where.items())


def recorded_cohorts(facts: Sequence[PatchFact]) -> tuple[Cohort, ...]:
    """The same of what a patch has recorded, when it was made; none where it was one batch, or small.

    The prompts around its facts are in no patch: these cohorts have no parts.
    """
    where = places(len(facts)) if any(f.right_after is not None for f in facts) else {}
    holds = [f.status in HOLDS for f in facts]
    then = [None if f.right_after is None else says(f.right_after, *f.targets) for f in facts]
    return tuple(_cohort(name, place, holds, then, {}) for name, place in where.items())


def _cohort(
    name: str, place: range, holds: Sequence[bool], then: Sequence[bool | None], around: Mapping[Part, Sequence[Tally]]
) -> Cohort:
    known = [i for i in place if then[i] is not None]
    after = measure([Tally.of([holds[i]]) for i in place])
    assert after
    return Cohort(
        name,
        place[0] + 1,
        place[-1] + 1,
        measure([Tally.of([bool(then[i])]) for i in known]),
        after,
        measure([Tally.of([holds[i]]) for i in known if then[i]]),
        tuple(_around({part: found[place.start : place.stop] for part, found in around.items()})),
    )


def _around(found: Mapping[Part, Sequence[Tally]]) -> Iterator[CohortPart]:
    for part, of in found.items():
        if m := measure(of):
            yield CohortPart(part.metric, part.group, part.own, int(sum(t.weight for t in of)), m)
