"""Probes: prompts around a fact whose answers are watched, with what the model has to know for them to count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mosectl.facts.groups import shown
from mosectl.text.jsonable import UNSAID
from mosectl.text.shown import counted


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is watched; ``answer`` is the known one, if any."""

    prompt: str
    answer: str | None = None
    group: str = ""  # what the file calls the group that it stands in (groups.canonical); "": it names none
    aliases: tuple[str, ...] = ()  # other right answers
    # Its conditions, each with an answer: it counts only if the model answers all of them rightly before the edit.
    needs: tuple[Probe, ...] = field(default=(), metadata=UNSAID)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the usual one first; none where none is known."""
        return (self.answer, *self.aliases) if self.answer else ()


@dataclass(frozen=True)
class NotCounted:
    """How many prompts of a metric, or of one group of them, were left out as their conditions were not met."""

    metric: str  # "locality" or "portability"
    group: str  # "": all prompts of the metric
    prompts: int
    of: int


def not_counted(found: Iterable[NotCounted]) -> list[str]:
    """A sentence a metric that says how many of its prompts were left out, and why."""
    told = list(found)
    return [_sentence(n, [g for g in told if g.metric == n.metric and g.group]) for n in told if not n.group]


def _sentence(n: NotCounted, groups: Sequence[NotCounted]) -> str:
    named = ", ".join(f"{shown(g.group)} {g.prompts:,} of {g.of:,}" for g in groups)
    within = f" ({named})" if named else ""
    what = f"{n.prompts:,} of {counted(n.of, f'{n.metric} prompt')} not counted{within}"
    return f"{what}: the model did not know what they build on"


def recorded_not_counted(record: Mapping[str, Any]) -> list[str]:
    """The same of what a patch or a cell of a bench has recorded."""
    return not_counted(NotCounted(**n) for n in record.get("not_counted", ()))
