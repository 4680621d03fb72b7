"""Numbers with their uncertainty: percentile bootstrap over facts (Efron & Tibshirani 1993, chapter 13).

Facts are resampled whole, with all their prompts: prompts of one fact stand or fall together. Resampling cannot invent what
was never seen: a share of 0 % or 100 % gets Wilson's interval instead (JASA 1927), the facts counted as its trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 0
Z95 = 1.96
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1, 2, … degrees of freedom

Tallies = Sequence[tuple[float, float]]


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
    """The value as text, a dash where there is none."""
    return "–" if m is None else f"{m.value:{form}}"


def interval_text(m: Measure | None, form: str) -> str:
    """The interval; where nothing varied, resampling has none to give."""
    if m is None:
        return "–"
    return f"{m.low:{form}} – {m.high:{form}}" if m.low < m.high else "–"


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
    rng, n = np.random.default_rng(seed), len(asked)
    drawn = np.empty(resamples)
    for i in range(resamples):  # one at a time: resamples × facts would not fit for large files
        index = rng.integers(0, n, n)
        drawn[i] = total[index].sum() / weight[index].sum()
    with np.errstate(over="ignore"):
        value = float(transform(np.array([total.sum() / weight.sum()]))[0])
        low, high = (float(x) for x in np.percentile(transform(drawn), [2.5, 97.5]))
    if (total == 0).all() or (total == weight).all():
        width = Z95**2 / (n + Z95**2)
        low, high = (0.0, width) if value == 0 else (1 - width, 1.0)
    return Measure(value, low, high, n)


def half_width(tallies: Sequence[Tally]) -> float:
    """Half the width of the ratio's 95 % interval by linearisation: cheap enough to ask while measuring; inf if unknown."""
    total, weight = np.array([(t.total, t.weight) for t in tallies if t.weight > 0], dtype=np.float64).reshape(-1, 2).T
    n = len(weight)
    if n < 2:
        return math.inf
    off = total - weight * (total.sum() / weight.sum())
    return float(Z95 * np.sqrt(n / (n - 1) * (off**2).sum()) / weight.sum())


def paired_lead(ours: Sequence[Tallies], theirs: Sequence[Tallies]) -> tuple[float, float, float]:
    """By how much the harmonic mean of some shares is higher in ``ours``, and its 95 % interval.

    Both are asked of the same facts: whole facts are resampled, the same for both.

    Args:
        ours, theirs: for each share (total, weight) of every fact.
    """
    both = np.array([ours, theirs], dtype=np.float64)  # (2, shares, facts, 2)
    both = both[:, both[0, :, :, 1].sum(1) > 0]  # what no fact asks for is no share

    def lead(index: np.ndarray[Any, Any]) -> float:
        total, weight = np.moveaxis(both[:, :, index].sum(2), -1, 0)
        shares = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
        with np.errstate(divide="ignore"):
            first, second = total.shape[1] / (1 / shares).sum(1)
        return float(first - second)

    rng, n = np.random.default_rng(SEED), both.shape[2]
    drawn = [lead(index) for index in rng.integers(0, n, (RESAMPLES, n))]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return lead(np.arange(n)), float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over runs with different seeds (Student's t)."""
    n = len(values)
    return fmean(values), T95[min(n - 1, len(T95)) - 1] * stdev(values) / n**0.5 if n > 1 else 0.0
