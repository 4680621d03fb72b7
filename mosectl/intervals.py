"""Numbers with their uncertainty: percentile bootstrap over facts (Efron & Tibshirani 1993, chapter 13).

Facts are resampled whole, with all their prompts: prompts of one fact stand or fall together. A share of 0 % or 100 %
has an interval of no width, however few facts there are: resampling cannot invent what was never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Tally:
    """What one fact (or text) adds to a number: a ``total`` out of a ``weight``, e.g. hits of prompts; 0 = not asked."""

    total: float
    weight: float

    @staticmethod
    def of(hits: Sequence[bool]) -> Tally:
        """Every prompt counts alike, whichever fact it belongs to."""
        return Tally(float(sum(hits)), float(len(hits)))


@dataclass(frozen=True)
class Measure:
    """Σ total / Σ weight, with its 95 % interval."""

    value: float
    low: float
    high: float
    units: int  # facts (or texts) it rests on


def value_text(m: Measure | None, form: str) -> str:
    return "–" if m is None else f"{m.value:{form}}"


def interval_text(m: Measure | None, form: str) -> str:
    """The interval; where nothing varied, resampling has none to give."""
    if m is None:
        return "–"
    return f"{m.low:{form}} – {m.high:{form}}" if m.low < m.high else "all alike"


def measure(
    tallies: Sequence[Tally],
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure | None:
    """The ratio of sums and its percentile interval; None when no fact has anything to ask.

    Args:
        transform: applied to every ratio, e.g. exp for a perplexity.
    """
    asked = [t for t in tallies if t.weight > 0]
    if not asked:
        return None
    total, weight = np.array([(t.total, t.weight) for t in asked], dtype=np.float64).T
    chance, n = np.random.default_rng(seed), len(asked)
    drawn = np.empty(resamples)
    for i in range(resamples):  # one at a time: resamples × facts would not fit for large files
        index = chance.integers(0, n, n)
        drawn[i] = total[index].sum() / weight[index].sum()
    with np.errstate(over="ignore"):
        value = float(transform(np.array([total.sum() / weight.sum()]))[0])
        low, high = (float(x) for x in np.percentile(transform(drawn), [2.5, 97.5]))
    return Measure(value, low, high, n)
