"""The batches of a run as they end: what the model answers right after each, and how far the run is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mosectl.editing.guard import Health
from mosectl.errors import NotFinite
from mosectl.facts.records import Fact
from mosectl.measure.answers import edit_prompts
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded
from mosectl.model.questions import ask
from mosectl.storage.progress import BatchDone, Clock


class Batches:
    """A run's batches. One that is the whole run is not asked: what holds right after it is what holds at the end."""

    def __init__(self, loaded: Loaded, facts: Sequence[Fact], size: int, chat: bool, clock: Clock) -> None:
        self.loaded, self.facts, self.size, self.chat, self.clock = loaded, facts, size, chat, clock
        self.several = size < len(facts)
        self.right_after: list[str] = []  # of each fact edited so far, the answer when its batch was done
        self.holds: list[bool] = []  # of each fact edited so far, as it was when it was last looked at
        self._questions = edit_prompts(loaded.tokenizer, facts) if self.several else []
        self.go_on(())

    def go_on(self, right_after: Sequence[str]) -> None:
        """Go on behind batches that an interrupted run has done."""
        self.right_after = list(right_after)
        self.holds = [says(text, *f.targets) for text, f in zip(right_after, self.facts, strict=False)]
        self._first, self._began = len(right_after), time.perf_counter()

    def ended(self, leads: Sequence[float], again: Sequence[int], base: Health, now: Health, *, text: bool) -> None:
        """A batch was kept: ask its facts what the model says now, and tell how far the run is.

        Args:
            leads: of the new object, nats: of each fact of the batch, then of those ``again``, edited along with it.
            base, now: how the model was before the run, and is after this batch.
            text: whether the guard has text to read.
        """
        if not self.several:
            return
        start = len(self.right_after)
        end = min(start + self.size, len(self.facts))
        with self.clock("ask batch"):
            self.right_after += self._answers(start, end)
        self.holds += [False] * (end - start)
        for i, lead in zip([*range(start, end), *again], leads, strict=True):
            self.holds[i] = lead > 0
        pace = (time.perf_counter() - self._began) / (end - self._first)
        drift = max((abs(now.norm[name] / norm - 1) for name, norm in base.norm.items()), default=0.0)
        rise = now.loss - base.loss if text else None
        number, batches = -(-end // self.size), -(-len(self.facts) // self.size)
        left = pace * (len(self.facts) - end)
        self.clock.batch(BatchDone(number, batches, end, len(self.facts), sum(self.holds), rise, drift, left))

    def _answers(self, start: int, end: int) -> list[str]:
        """Greedy answers to the bare prompts of facts start … end; a model whose numbers are not finite says nothing."""
        try:
            said = ask(self.loaded.model, self.loaded.tokenizer, self._questions[start:end], chat=self.chat)
        except NotFinite:
            said = [""] * (end - start)
        return [answer(text) for text in said]
