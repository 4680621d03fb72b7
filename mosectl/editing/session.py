"""One run over a list of facts: batches, rounds of targets and solve, care for earlier edits, the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosectl.editing.batches import Batches
from mosectl.editing.by_subject import companions, sharing
from mosectl.editing.contexts import Contexts, build_contexts
from mosectl.editing.edited_layers import EditedLayers, Standing
from mosectl.editing.ends import ends_asked, going_on, running_on
from mosectl.editing.guard import Health, harm, health, remedy
from mosectl.editing.layers import LAST
from mosectl.editing.methods.base import SPREAD, Trainer
from mosectl.editing.published import published_targets
from mosectl.editing.resume import Progress, State, belongs
from mosectl.editing.targets import Targets, least_by_fact, optimise_targets
from mosectl.errors import EditFailed, NotFinite
from mosectl.facts.records import Fact
from mosectl.model.forward import input_device
from mosectl.model.loading import Loaded
from mosectl.model.memory import ran_out
from mosectl.patch.fingerprint import sha256
from mosectl.storage.progress import Clock, SlippedDone
from mosectl.storage.state_file import digest

SLIPPED = "slipped"  # the phase in which a run's slipped facts are edited again
TOGETHER = 100  # of these at once, or as many as a batch has where that is more
REPLAYED = 2.0  # of ``replay_margin``: by how much facts that are edited again shall lead


@dataclass(frozen=True)
class _Round:
    """One round's outcome, to come back to."""

    score: tuple[int, float]
    targets: Targets
    layers: Standing


class Session:
    """A run over a list of facts, batch by batch, on the edited layers of one live model."""

    def __init__(self, loaded: Loaded, layers: EditedLayers) -> None:
        self.loaded, self.layers, self.options = loaded, layers, layers.options
        self.stopped = ""
        self.subjects: list[str] = []  # of the facts of the present batch
        self.going_on: Tensor | None = None  # (vocabulary,) bool, tokens that go on with a word, once that is asked

    def watch(self, pieces: list[list[int]]) -> None:
        """Remember how the model is before the first batch, for the guard."""
        self.pieces, self.base_health = pieces, health(self.loaded.model, pieces, self.layers.W)
        self.curve: list[tuple[int, Health]] = [(0, self.base_health)]  # facts edited so far, and health then

    def edit(
        self,
        facts: Sequence[Fact],
        prefixes: Sequence[str],
        wordings: Sequence[Sequence[str]],
        clock: Clock,
        progress: Progress | None = None,
    ) -> list[float]:
        """Edit all facts batch by batch; returns the loss of each right after its batch, nats a token.

        Earlier facts that have slipped are edited again along with a batch and at the end. A batch that does harm is taken
        back and ends the run: there are fewer losses than facts then.

        Raises:
            EditFailed: the very first batch did harm.
        """
        layers, self.facts, self.prefixes, self.wordings = self.layers, facts, prefixes, wordings
        usual = layers.solver.published.batch if self.options.published else 0
        size = self.options.batch_size or usual or len(facts)
        # Hashed once, and where there is something to keep or to go on with: statistics of large models take seconds.
        kept = progress if progress and (progress.resume or size < len(facts)) else None
        ours = self.identity(facts) if kept else {}
        shapes = {name: (W.shape[0], W.shape[1]) for name, W in layers.W.items()}
        begun = kept.load(ours, shapes, len(facts), layers.solver.carries(shapes)) if kept else None
        self.batches = batches = Batches(self.loaded, facts, size, self.options.chat, clock)
        losses = self.take(begun) if begun else []
        for start in range(len(losses), len(facts), size):
            batch = facts[start : start + size]
            with clock("targets", len(facts) * self.options.rounds, in_parts=True):
                again = self._again(range(start, start + len(batch)))
                layers.remember(self.options.weight_of_earlier)
            new = [*range(start, start + len(batch))]
            contexts, before = self._contexts(new, again), layers.standing()
            done = self._batch(contexts, clock, start, len(batch), len(facts))
            with clock("guard"):
                now = health(self.loaded.model, self.pieces, layers.W)
            if what := harm(self.base_health, now, self.options.guard):
                layers.go_back(before)
                if not losses:
                    raise EditFailed(f"the edit harms the model: {what}", fix=remedy(layers.solver.gentler))
                last = len(losses)
                self.stopped = (
                    f"facts {start + 1}-{start + len(batch)} were taken back: {what}; the first {last} are kept"
                )
                break
            layers.keep()
            losses += done.loss_before[: len(batch)].tolist()
            self.curve.append((len(losses), now))
            layers.earlier.add(contexts, done.margin_before[: len(batch)].tolist(), layers.W)
            layers.earlier.edited_again(again, done.margin_before[len(batch) :].tolist(), layers.W)
            batches.ended(self.base_health, now, text=bool(self.pieces))
            if kept and size < len(facts):
                with clock("keep"):
                    kept.save(ours, self.state(losses))
        clock.ended("targets")
        if size < len(facts) and not self.stopped and self.options.replay_margin:
            most = size if self.options.published else max(size, TOGETHER)
            self._edit_slipped(clock, most)
        return losses

    def _edit_slipped(self, clock: Clock, most: int) -> None:
        """At the end of several batches every fact is asked, and those that have slipped are edited again, each once, the
        worst first, ``most`` at once: for as long as more of all facts lead for it. What fails leaves the run as it was.
        """
        layers, earlier, n, ended = self.layers, self.layers.earlier, len(self.facts), ""
        tried: set[int] = set()
        with clock("ask batch"):
            held = before = earlier.leading()
        while held < n:
            left = [i for i in earlier.slipped_of_all(self.options.replay_margin) if i not in tried]
            if not any(earlier.leads[i] <= 0 for i in left[:most]):
                break
            again, standing = [*left[:most]], layers.standing()
            again += companions(self.facts, again, range(n)) if self._shared else []
            try:
                ended, held = self._tried_again(again, held, clock, len(tried), len(tried) + max(len(left), len(again)))
            except (EditFailed, NotFinite) as e:
                ended = e.what
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                ended = "a weight could not be decomposed"
            except RuntimeError as e:
                if not ran_out(e):
                    raise
                ended = "memory ran out"
            if ended:
                layers.go_back(standing)
                break
            tried.update(again)
        clock.ended(SLIPPED)
        if tried or ended:
            clock.batch(SlippedDone(len(tried), n, held, before, ended))

    def _tried_again(self, again: Sequence[int], held: int, clock: Clock, first: int, total: int) -> tuple[str, int]:
        """Edit these facts again, of which ``held`` of all lead; returns why it cannot stay, empty if it does, and how many
        lead then.

        For the progress: they are the ``first`` … of ``total``.
        """
        layers, earlier = self.layers, self.layers.earlier
        with clock(SLIPPED, total * self.options.rounds, in_parts=True):
            layers.remember(self.options.weight_of_earlier)
            contexts = self._contexts([], again)
        done = self._batch(contexts, clock, first, len(again), total, SLIPPED)
        with clock("guard"):
            now = health(self.loaded.model, self.pieces, layers.W)
        with clock("ask batch"):
            leading = earlier.leading()
        if why := harm(self.base_health, now, self.options.guard):
            return why, held
        if leading <= held:
            return f"with {len(again)} more edited again no more facts lead", held
        layers.keep()
        self.curve[-1] = (len(self.facts), now)
        earlier.edited_again(again, done.margin_before.tolist(), layers.W)
        return "", leading

    def _contexts(self, new: Sequence[int], again: Sequence[int]) -> Contexts:
        """The rows of a batch of ``new`` facts and of those edited ``again``, by number, and by how much each shall lead."""
        layers, loaded, options, facts = self.layers, self.loaded, self.options, [self.facts[i] for i in (*new, *again)]
        self.subjects = [fact.subject for fact in facts]
        contexts = build_contexts(
            loaded.model, loaded.tokenizer, facts, self.prefixes, [self.wordings[i] for i in (*new, *again)],
            chat=options.chat, last=options.fact_token == LAST, replies=bool(options.replies),
        ).above(loaded.model, layers.arch, layers.projections[0].layer)  # fmt: skip
        return replace(contexts, least=self._least(contexts.fact, len(new)))

    def _least(self, fact: Tensor, new: int) -> Tensor:
        """Nats by which rows of these facts (B,) shall lead: the first ``new`` by the margin, earlier ones by what lets them
        hold for a while; to move them further would only cost others.
        """
        margin = self.options.targets.least_lead
        again = min(margin, REPLAYED * self.options.replay_margin)
        return torch.full(fact.shape, margin, device=fact.device).masked_fill(fact >= new, again)

    def _again(self, new: range) -> list[int]:
        """Facts before these that are edited along with them: that have slipped, or share a subject."""
        again = self.layers.earlier.slipped(self.options.replay_margin)
        if self.options.replay_margin and self._shared:
            again += [i for i in companions(self.facts, new, range(new.start)) if i not in again]
        return again

    def identity(self, facts: Sequence[Fact]) -> dict[str, str]:
        """What this session's state belongs to: hashes, by name."""
        return belongs(facts, self.options, [p.layer for p in self.layers.projections]) | {
            "weights": digest([sha256(w) for w in self.layers.stored.values()]),
            "statistics": digest([sha256(C) for C in self.layers.C.values()]),
        }

    def state(self, losses: Sequence[float]) -> State:
        """What it takes to go on from here."""
        layers, earlier = self.layers, self.layers.earlier
        turns = {name: turns.tensors() for name, turns in layers.turns.items()}
        told = (self.curve, losses, self.batches.right_after, dict(layers.carried))
        return State(dict(layers.W), turns, earlier.kept(), *told)

    def take(self, state: State) -> list[float]:
        """Go on from a state; returns the losses of the facts it has edited."""
        layers = self.layers
        layers.resume(state.W, state.turns, state.carried)
        layers.earlier.take(state.earlier, input_device(self.loaded.model), layers.W)
        self.curve = list(state.curve)
        self.batches.go_on(state.right_after)
        return list(state.losses)

    def _batch(
        self, contexts: Contexts, clock: Clock, first: int, n: int, total: int, phase: str = "targets"
    ) -> Targets:
        """Alternate targets and solve until every fact holds by the margin, or all hold and a round brought nothing more; of
        at most ``rounds`` keep the best.

        For the progress: ``n`` facts, the ``first`` of the ``phase``'s ``total`` at which they begin.
        """
        layers, options, rounds = self.layers, self.options, self.options.rounds
        best: _Round | None = None
        assert contexts.least is not None
        least = least_by_fact(contexts.least, contexts.fact, int(contexts.fact.max()) + 1).cpu()
        urgency = torch.ones(int(contexts.fact.max()) + 1, dtype=torch.float64)  # (facts,) weight of each in the solve

        def told(step: Callable[[int, int], None], r: int) -> Callable[[int, int], None]:
            last = (first + n) * rounds  # the question after the last round is none
            return lambda done, of: step(min(first * rounds + r * n + done * n // of, last), total * rounds)

        for r in range(rounds + 1):
            with clock(phase, total * rounds, in_parts=True) as step:
                if layers.solver.searches and not layers.published:
                    contexts = self._ends_asked(contexts)
                targets = self._targets(contexts, r < rounds and layers.solver.searches, told(step, r))
            now = self._round(targets)
            stuck = best is not None and now.score[0] == best.score[0] == len(urgency) and now.score <= best.score
            best = now if options.published else max(best or now, now, key=lambda tried: tried.score)
            done = (targets.margin_before >= least) | ~torch.isfinite(targets.loss_before)
            if r == rounds or ((stuck or bool(done.all())) and not options.published):
                break
            if r:
                urgency[~(targets.margin_before > 0)] *= options.unreached_weight_growth
            with clock("solve", in_parts=True) as step:
                if isinstance(layers.solver, Trainer):
                    bar = told(step, r) if phase == "targets" else lambda *_: None  # the phase's own goes on
                    layers.fit(layers.solver, contexts, self.loaded.tokenizer.eos_token_id, bar)
                else:
                    layers.solve(contexts, targets, options.preservation_decay**r, urgency)
        assert best is not None
        layers.go_back(best.layers)
        return best.targets

    def _targets(self, contexts: Contexts, needed: bool, on_step: Callable[[int, int], None]) -> Targets:
        """Values for the edited layers; where none are needed, how the facts are as the model stands."""
        layers, model, options = self.layers, self.loaded.model, self.options.targets
        if needed and layers.published:
            top, site = layers.projections[-1], layers.solver.published.site
            return published_targets(model, layers.arch, top, contexts, options, site, on_step)
        placed = layers.projections[-1:] if layers.placement == SPREAD else layers.projections

        def search(contexts: Contexts, needed: bool) -> Targets:
            asked = options if needed else replace(options, steps=0)
            given = (contexts, asked, on_step, layers.metric, self.going_on)
            return optimise_targets(model, layers.arch, placed, *given)

        return sharing(self.subjects, contexts, search) if needed and self._shared else search(contexts, needed)

    @property
    def _shared(self) -> bool:
        """Facts of one subject share a key."""
        return self.layers.solver.searches and not self.options.published and self.options.fact_token != LAST

    def _ends_asked(self, contexts: Contexts) -> Contexts:
        """The end of the last word is asked of the facts that are answered as they shall be but for that."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        facts = running_on(model, tokenizer, contexts)
        if self.going_on is None and bool(facts.any()):
            self.going_on = going_on(tokenizer, model.get_output_embeddings().weight.shape[0])
        return ends_asked(contexts, facts)

    def _round(self, targets: Targets) -> _Round:
        """How far the batch is, as the model stands: facts that hold, then the lower loss (a lost fact counts 20 nats)."""
        held = int((targets.margin_before > 0).sum())
        loss = float(targets.loss_before.clamp(max=20).nan_to_num(20).mean())
        return _Round((held, -loss), targets, self.layers.standing())
