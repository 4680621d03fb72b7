"""What work tells while it goes on: the phase, how far it is, the seconds it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnStep = Callable[[str, int, int], None]  # phase, done, total


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

    def _step(self, phase: str, done: int, total: int) -> None:
        self._told[phase] = done, total
        if self._on_step:
            self._on_step(phase, done, total)
