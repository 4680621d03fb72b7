"""What work tells while it goes on: the phase, how far it is, the seconds it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

OnStep = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class BatchDone:
    """Where a run of several batches stands after one of them."""

    number: int  # of the batch, from 1
    batches: int  # in all
    facts: int  # edited so far
    total: int
    held: int  # of those edited so far, right after each one's own batch
    earlier_held: int  # of earlier facts asked now and lately, a sample at random, and
    earlier_asked: int  # how many these are
    text_loss: float | None  # by how much that of ordinary text has risen, nats a token; None: there is no text
    norm_drift: float  # the largest over the edited weights: | ‖W‖ / base − 1 |
    seconds_left: float  # at the pace of the batches so far


@dataclass(frozen=True)
class SlippedDone:
    """What editing slipped facts again, at the end of a run of several batches, came to."""

    edited: int  # facts that were edited again and stay so
    total: int  # of the run
    held: int  # of all facts, those whose bare prompts lead now, and
    held_before: int  # before any was edited again
    ended: str  # why others that had slipped were left as they were; empty: none were


@runtime_checkable
class HearsOfBatches(Protocol):
    """A progress callback that is told of batches, too."""

    def batch(self, done: BatchDone | SlippedDone) -> None:
        """Hear of a batch that is done and kept, or of what was edited again at the end."""


class Clock:
    """Seconds spent in each phase, and the progress callback bound to it."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_step = on_step
        self._told: dict[str, tuple[int, int]] = {}  # by phase: done and total, as told last

    @contextmanager
    def __call__(self, phase: str, total: int = 1, *, in_parts: bool = False) -> Iterator[Callable[[int, int], None]]:
        """Time a phase under its name; what it yields is told how much is done.

        Args:
            total: what there is to do, as far as that is known.
            in_parts: the block is one part of the phase, which others may follow: :meth:`ended` says when it is done.
        """
        if not in_parts or phase not in self._told:
            self._step(phase, 0, total)
        start = time.perf_counter()
        try:
            yield lambda done, total: self._step(phase, done, total)
            if not in_parts:
                self.ended(phase)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def ended(self, phase: str) -> None:
        """A phase is over, however much of what it might have taken was needed."""
        done, total = self._told.get(phase, (0, 0))
        if done < total:
            self._step(phase, total, total)

    def batch(self, done: BatchDone | SlippedDone) -> None:
        """A batch is done, or what is edited again at the end: told to a callback that :class:`HearsOfBatches`."""
        if isinstance(self._on_step, HearsOfBatches):
            self._on_step.batch(done)

    def _step(self, phase: str, done: int, total: int) -> None:
        self._told[phase] = done, total
        if self._on_step:
            self._on_step(phase, done, total)
