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

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[int, int], None]]:
        """Time a phase under its name; what it yields is told how much is done."""

        def step(done: int, total: int) -> None:
            if self._on_step:
                self._on_step(phase, done, total)

        start = time.perf_counter()
        step(0, 1)
        reported = False

        def told(done: int, total: int) -> None:
            nonlocal reported
            reported = True
            step(done, total)

        try:
            yield told
            if not reported:
                step(1, 1)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
