"""`--fail-under reliability=0.95`: least values that an evaluation must reach, for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosectl.errors import BelowThreshold, UsageError

if TYPE_CHECKING:
    from mosectl.facts.records import Fact
    from mosectl.measure.evaluate import Evaluation


ABILITIES = "abilities"  # where a threshold otherwise names a protocol


@dataclass(frozen=True)
class Threshold:
    """The least share that is good enough."""

    protocol: str  # or ABILITIES
    metric: str  # or the name of a task, whose first metric counts
    least: float

    def __str__(self) -> str:
        return f"{self.protocol}.{self.metric}={self.least:g}"


def parse_threshold(text: str, protocols: Sequence[str], tasks: Sequence[str] = ()) -> Threshold:
    """A threshold from "metric=value" (under `generation`), "protocol.metric=value" or "abilities.task=value".

    Args:
        protocols: those that will be measured.
        tasks: those of `--abilities`.
    Raises:
        UsageError: no such metric, a protocol or task that is not measured, or not a share between 0 and 1.
    """
    from mosectl.measure.protocols import METRICS

    name, _, number = text.partition("=")
    protocol, _, metric = name.rpartition(".")
    protocol = protocol or "generation"
    if name.startswith(f"{ABILITIES}."):
        protocol, metric = ABILITIES, name.removeprefix(f"{ABILITIES}.")  # a task's name may have a dot in it
        if metric not in tasks:
            fix = f"measured are {', '.join(tasks) or 'none'} (see --abilities)"
            raise UsageError(f"--fail-under {text}: task '{metric}' is not measured", fix=fix)
    elif metric not in METRICS:
        what = f"--fail-under {text}: no such metric"
        raise UsageError(what, fix=f"write metric=value with one of {', '.join(METRICS)}, or protocol.metric=value")
    elif protocol not in protocols:
        fix = f"measured are {', '.join(protocols)} (see --protocol)"
        raise UsageError(f"--fail-under {text}: protocol '{protocol}' is not measured", fix=fix)
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    if not 0 <= least <= 1:
        raise UsageError(f"--fail-under {text}: not a share", fix=f"write a number from 0 to 1, e.g. {name}=0.95")
    return Threshold(protocol, metric, least)


def check_asked(facts: Sequence[Fact], thresholds: Sequence[Threshold], name: str) -> None:
    """Before the work: can these facts reach the thresholds at all? What only the model can tell is left to the end.

    Args:
        name: of what is to be evaluated.
    Raises:
        BelowThreshold: the facts have nothing to ask for one of them; the message names every such.
    """
    from mosectl.measure.protocols import asks

    judged = [t for t in thresholds if t.protocol != ABILITIES]
    unasked = [t for t in judged if not any(t.metric in asks(t.protocol, fact) for fact in facts)]
    if unasked:
        raise BelowThreshold("; ".join(map(_unasked, unasked)), where=name, fix=_ASK)


_ASK = "give the facts prompts for what was not measured, or leave that threshold out"


def _unasked(t: Threshold) -> str:
    return f"{t.protocol}.{t.metric} was not measured: the facts have nothing to ask for it"


def _uncounted(t: Threshold) -> str:
    return f"{t.protocol}.{t.metric} was not measured: no prompt counts, as the model did not know what they build on"


def check_thresholds(evaluation: Evaluation, thresholds: Sequence[Threshold]) -> None:
    """Compare the values after the edit (not their intervals) with what was asked for.

    Raises:
        BelowThreshold: one is below, or could not be measured; the message names every one.
    """
    failed, unasked = [], False
    for t in thresholds:
        found = _value(evaluation, t)
        if found is None:
            unasked = True
            failed.append(next((_uncounted(t) for n in evaluation.not_counted if n.metric == t.metric), _unasked(t)))
        elif found < t.least - 1e-9:  # sums of thirds and sevenths
            failed.append(f"{t.protocol}.{t.metric} is {found:.4f}, below {t.least:g}")
    if failed:
        fix = "edit with more --rounds or other --layers, or lower the threshold"
        if unasked:
            fix = _ASK
        raise BelowThreshold("; ".join(failed), where=evaluation.subject.name, fix=fix)


def _value(evaluation: Evaluation, t: Threshold) -> float | None:
    if t.protocol == ABILITIES:
        return next((a.after.value for a in evaluation.abilities if a.task == t.metric), None)
    metric = evaluation.metric(t.protocol, t.metric)
    return metric.after.value if metric and metric.after else None
