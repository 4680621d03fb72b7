"""`--fail-under reliability=0.95`: least values that an evaluation must reach, for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosectl.errors import BelowThreshold, UsageError

if TYPE_CHECKING:
    from mosectl.evaluation import Evaluation


@dataclass(frozen=True)
class Threshold:
    """The least share that is good enough."""

    protocol: str
    metric: str
    least: float

    def __str__(self) -> str:
        return f"{self.protocol}.{self.metric}={self.least:g}"


def parse_threshold(text: str, protocols: Sequence[str]) -> Threshold:
    """A threshold from "metric=value" (under `generation`) or "protocol.metric=value".

    Args:
        protocols: those that will be measured.
    Raises:
        UsageError: no such metric, a protocol that is not measured, or not a share between 0 and 1.
    """
    from mosectl.protocols import METRICS

    name, _, number = text.partition("=")
    protocol, _, metric = name.rpartition(".")
    protocol = protocol or "generation"
    if metric not in METRICS:
        what = f"--fail-under {text}: no such metric"
        raise UsageError(what, fix=f"write metric=value with one of {', '.join(METRICS)}, or protocol.metric=value")
    if protocol not in protocols:
        fix = f"measured are {', '.join(protocols)} (see --protocol)"
        raise UsageError(f"--fail-under {text}: protocol '{protocol}' is not measured", fix=fix)
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    if not 0 <= least <= 1:
        raise UsageError(f"--fail-under {text}: not a share", fix=f"write a number from 0 to 1, e.g. {name}=0.95")
    return Threshold(protocol, metric, least)


def check_thresholds(evaluation: Evaluation, thresholds: Sequence[Threshold]) -> None:
    """Compare the values after the edit (not their intervals) with what was asked for.

    Raises:
        BelowThreshold: one is below, or could not be measured; the message names every one.
    """
    failed, unasked = [], False
    for t in thresholds:
        metric = evaluation.metric(t.protocol, t.metric)
        found = metric.after if metric else None
        if found is None:
            unasked = True
            failed.append(f"{t.protocol}.{t.metric} was not measured: the facts have nothing to ask for it")
        elif found.value < t.least - 1e-9:  # sums of thirds and sevenths
            failed.append(f"{t.protocol}.{t.metric} is {found.value:.4f}, below {t.least:g}")
    if failed:
        fix = "edit with more --rounds or other --layers, or lower the threshold"
        if unasked:
            fix = "give the facts prompts for what was not measured, or leave that threshold out"
        raise BelowThreshold("; ".join(failed), where=evaluation.subject.name, fix=fix)
