"""The batches of a run as they end: what the model answers right after each, and how far the run is."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence

from mosectl.editing.guard import Health
from mosectl.errors import NotFinite
from mosectl.facts.records import Fact
from mosectl.measure.answers import edit_prompts
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded
from mosectl.model.questions import ask
from mosectl.storage.progress import BatchDone, Clock

LATELY = 40  # earlier facts asked last, of which the share that holds is told


class Batches:
    """A run's batches. One that is the whole run is not asked: what holds right after it is what holds at the end."""

    def __init__(self, loaded: Loaded, facts: Sequence[Fact], size: int, chat: bool, clock: Clock) -> None:
        self.loaded, self.facts, self.size, self.chat, self.clock = loaded, facts, size, chat, clock
        self.several = size < len(facts)
        self.right_after: list[str] = []  # of each fact edited so far, the answer when its batch was done
        self.lately: deque[bool] = deque(maxlen=max(LATELY, size))  # of earlier facts asked last, whether each held
        self._questions = edit_prompts(loaded.tokenizer, facts) if self.several else []
        self.go_on(())

    def go_on(self, right_after: Sequence[str]) -> None:
        """Go on behind batches that an interrupted run has done."""
        self.right_after = list(right_after)
        self.held = sum(self._hold(range(len(right_after)), right_after))  # of these
        self._first, self._began = len(right_after), time.perf_counter()

    def ended(self, base: Health, now: Health, *, text: bool) -> None:
        """A batch was kept: ask its facts, and as many earlier ones at random, what the model says now, and tell how far the
        run is.

        Args:
            base, now: how the model was before the run, and is after this batch.
            text: whether the guard has text to read.
        """
        if not self.several:
            return
        start = len(self.right_after)
        end = min(start + self.size, len(self.facts))
        earlier = random.Random(start).sample(range(start), min(self.size, start))
        with self.clock("ask batch"):
            said = self._answers([*range(start, end), *earlier])
        self.right_after += said[: end - start]
        self.held += sum(self._hold(range(start, end), said[: end - start]))
        self.lately += self._hold(earlier, said[end - start :])
        pace = (time.perf_counter() - self._began) / (end - self._first)
        drift = max((abs(now.norm[name] / norm - 1) for name, norm in base.norm.items()), default=0.0)
        rise = now.loss - base.loss if text else None
        number, batches = -(-end // self.size), -(-len(self.facts) // self.size)
        held = self.held, sum(self.lately), len(self.lately)
        left = pace * (len(self.facts) - end)
        self.clock.batch(BatchDone(number, batches, end, len(self.facts), *held, rise, drift, left))

    def _hold(self, numbers: Sequence[int], said: Sequence[str]) -> list[bool]:
        return [says(text, *self.facts[i].targets) for i, text in zip(numbers, said, strict=True)]

    def _answers(self, numbers: Sequence[int]) -> list[str]:
        """Greedy answers to the bare prompts of these facts; a model whose numbers are not finite says nothing."""
        try:
            said = ask(self.loaded.model, self.loaded.tokenizer, [self._questions[i] for i in numbers], chat=self.chat)
        except NotFinite:
            said = [""] * len(numbers)
        return [answer(text) for text in said]
