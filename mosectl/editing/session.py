"""One run over a list of facts: batches, rounds of targets and solve, care for earlier edits, the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosectl._version import __version__
from mosectl.editing.contexts import Contexts, build_contexts
from mosectl.editing.ends import ends_asked, going_on, running_on
from mosectl.editing.guard import Health, harm, health, remedy
from mosectl.editing.layers import LAST
from mosectl.editing.low_rank import compact_change
from mosectl.editing.methods import method
from mosectl.editing.methods.base import (
    PER_LAYER,
    SPREAD,
    Columns,
    LayerProblem,
    ModelProblem,
    Solver,
    Trainer,
    Turner,
    seeks_compact,
)
from mosectl.editing.options import EditOptions
from mosectl.editing.previous_edits import Earlier
from mosectl.editing.published import averages, bare_rows, published_targets
from mosectl.editing.resume import Progress, State
from mosectl.editing.second_moments import Moments
from mosectl.editing.targets import Targets, optimise_targets
from mosectl.editing.turns import LayerTurns, Pair, from_tensors
from mosectl.errors import EditFailed
from mosectl.facts.records import Fact
from mosectl.hypernetwork.file import Editor
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection
from mosectl.model.forward import hidden_at, input_device
from mosectl.model.loading import Loaded
from mosectl.model.weights import set_weight, solve_device, weight_of
from mosectl.patch.change import Change, change_between, changed, of_rotations
from mosectl.patch.fingerprint import sha256
from mosectl.storage.progress import Clock
from mosectl.storage.state_file import digest


@dataclass(frozen=True)
class _Standing:
    """One round's outcome, to come back to."""

    score: tuple[int, float]
    targets: Targets
    W: dict[str, Tensor]
    pairs: dict[str, Pair | None]


DAMPING = 0.1  # of G
TIGHTENED = 4  # tolerances tried for the compact form
KEPT = 0.99  # the share of answers that it has to keep


class Session:
    """The edited layers of one live model: base weight, weight so far, statistics and earlier edits, by module path."""

    def __init__(
        self,
        loaded: Loaded,
        arch: Architecture,
        projections: list[Projection],
        moments: Moments,
        options: EditOptions,
        editor: Editor | None = None,
    ) -> None:
        self.loaded, self.arch, self.projections, self.options = loaded, arch, projections, options
        self.solver = method(options.method)
        own = options.placement == "method" or not self.solver.searches
        self.placement = self.solver.placement if own else options.placement
        self.side = self.solver.side_on(projections)
        self.published = options.published and self.solver.searches
        self.solver_options = {**self.solver.defaults, **options.solver}
        place = torch.empty(0, dtype=torch.float64, device=solve_device(weight_of(loaded.model, projections[0]).device))
        # What one layer's solve takes is on its device, the rest waits on the host: together they can exceed a GPU.
        self.stored = {p.name: weight_of(loaded.model, p).detach().clone().cpu() for p in projections}
        self.W0 = {p.name: p.oriented(self.stored[p.name]).double() for p in projections}  # (d, p)
        self.W = {name: W0.to(place) for name, W0 in self.W0.items()}
        self.C = dict(moments.C)  # (p, p) float32
        self.text = moments if isinstance(self.solver, Trainer) else None  # a solver's are given up as it goes
        self.carried: dict[str, Tensor] = {}  # what the method carries from batch to batch
        # By module path, where compact rotations are sought from the start.
        compact = seeks_compact(self.solver, options.form, max(len(W0) for W0 in self.W0.values()))
        self.turns = {name: LayerTurns(name, W0.to(place)) for name, W0 in self.W0.items()} if compact else {}
        self.metric = None
        if options.targets.optimizer == "natural-gradient" and self.solver.searches:
            self.metric = {p.name: _metric(moments.G[p.name].to(place)) for p in projections}
        self.earlier = Earlier(loaded.model, projections)
        # Of earlier edits, as the present batch found them: P and Q, or the columns they are sums over.
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.columns: dict[str, Columns] = {}
        self.compaction: dict[str, float] = {}  # what the patch's form leaves out of the effect, by module path
        self.stopped = ""
        self.going_on: Tensor | None = None  # (vocabulary,) bool, tokens that go on with a word, once that is asked
        self.editor = editor

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the base weights back at the end, whatever happened."""
        try:
            yield
        finally:
            for p in self.projections:
                with torch.no_grad():
                    weight_of(self.loaded.model, p).copy_(self.stored[p.name])

    def watch(self, pieces: list[list[int]]) -> None:
        """Remember how the model is before the first batch, for the guard."""
        self.pieces, self.base_health = pieces, health(self.loaded.model, pieces, self.W)
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

        Earlier facts that have slipped are edited again along with a batch. A batch that does harm is taken back and ends
        the run: there are fewer losses than facts then.

        Raises:
            EditFailed: the very first batch did harm.
        """
        usual = self.solver.published.batch if self.options.published else 0
        size = self.options.batch_size or usual or len(facts)
        # Hashed once, and where there is something to keep or to go on with: statistics of large models take seconds.
        kept = progress if progress and (progress.resume or size < len(facts)) else None
        ours = self.identity(facts) if kept else {}
        shapes = {name: (W.shape[0], W.shape[1]) for name, W in self.W.items()}
        begun = kept.load(ours, shapes, len(facts), self.solver.carries(shapes)) if kept else None
        losses = self.take(begun) if begun else []
        for start in range(len(losses), len(facts), size):
            batch = facts[start : start + size]
            with clock("targets"):
                again = self.earlier.slipped(self.options.replay_margin)
                self._remember(self.options.previous_edit_weight)
            taken = [*range(start, start + len(batch)), *again]
            contexts = build_contexts(
                self.loaded.model, self.loaded.tokenizer, [facts[i] for i in taken], prefixes,
                [wordings[i] for i in taken], chat=self.options.chat, last=self.options.fact_token == LAST,
            ).above(self.loaded.model, self.arch, self.projections[0].layer)  # fmt: skip
            before = dict(self.W)
            done = self._batch(contexts, clock, start, len(batch), len(facts))
            with clock("guard"):
                now = health(self.loaded.model, self.pieces, self.W)
            if what := harm(self.base_health, now, self.options.guard):
                for p in self.projections:
                    self.set_weight(p, self.turns[p.name].drop() if self.turns else before[p.name])
                if not losses:
                    raise EditFailed(f"the edit harms the model: {what}", fix=remedy(self.solver.gentler))
                last = len(losses)
                self.stopped = (
                    f"facts {start + 1}-{start + len(batch)} were taken back: {what}; the first {last} are kept"
                )
                break
            for p in self.projections if self.turns else ():
                self.set_weight(p, self.turns[p.name].keep())
            losses += done.loss_before[: len(batch)].tolist()
            self.curve.append((len(losses), now))
            self.earlier.add(len(batch), contexts, self.W)
            self.earlier.edited_again(again, done.margin_before[len(batch) :].tolist(), self.W)
            if kept and size < len(facts):
                with clock("keep"):
                    kept.save(ours, self.state(losses))
        return losses

    def _remember(self, weight: float) -> None:
        """What earlier edits' facts, each of this weight, ask of the coming solves."""
        if self.turns:
            self.columns = self.earlier.columns(weight) if weight else {}
        else:
            self.moments = self.earlier.moments(weight, self._mean if self.published else None) if weight else {}

    def identity(self, facts: Sequence[Fact]) -> dict[str, str]:
        """What this session's state belongs to: hashes, by name."""
        asked = [{k: v for k, v in f.fields().items() if k != "source"} for f in facts]
        return {
            "facts": digest(asked),
            "settings": digest([self.options.to_record(), [p.name for p in self.projections]]),
            "weights": digest([sha256(w) for w in self.stored.values()]),
            "statistics": digest([sha256(C) for C in self.C.values()]),
            "version of mosectl": __version__,
        }

    def state(self, losses: Sequence[float]) -> State:
        """What it takes to go on from here."""
        earlier = self.earlier
        assert earlier.contexts is not None
        turns = {name: turns.tensors() for name, turns in self.turns.items()}
        values, carried = dict(earlier.values), dict(self.carried)
        return State(dict(self.W), turns, earlier.contexts, values, earlier.failures, self.curve, losses, carried)

    def take(self, state: State) -> list[float]:
        """Go on from a state; returns the losses of the facts it has edited."""
        for p in self.projections:
            W = state.W[p.name].to(self.W[p.name])
            if self.turns:
                W = self.turns[p.name].take(*from_tensors({n: x.to(W) for n, x in state.turns[p.name].items()}))
            self.set_weight(p, W)
        values = {name: V.to(self.W[name]) for name, V in state.values.items()}
        self.earlier.take(state.contexts.to(input_device(self.loaded.model)), values, state.failures)
        self.curve = list(state.curve)
        place = self.W[self.projections[0].name].device
        self.carried = {name: x.to(place) for name, x in state.carried.items()}
        return list(state.losses)

    def _batch(self, contexts: Contexts, clock: Clock, first: int, n: int, total: int) -> Targets:
        """Alternate targets and solve until every fact holds by the margin, or all hold and a round brought nothing more; of
        at most ``rounds`` keep the best.

        For the progress: ``n`` new facts, the ``first`` of ``total`` at which they begin.
        """
        best: _Standing | None = None
        urgency = torch.ones(int(contexts.fact.max()) + 1, dtype=torch.float64)  # (facts,) weight of each in the solve
        rounds = self.options.rounds
        placed = self.projections[-1:] if self.placement == SPREAD else self.projections

        def told(step: Callable[[int, int], None], r: int) -> Callable[[int, int], None]:
            return lambda done, of: step(first * rounds + r * n + done * n // of, total * rounds)

        for r in range(rounds + 1):
            with clock("targets") as step:
                on_step = told(step, r)
                if self.solver.searches and not self.published:
                    contexts = self._ends_asked(contexts)
                needed = r < rounds and self.solver.searches
                options = self.options.targets if needed else replace(self.options.targets, steps=0)
                targets = (
                    self._published_targets(contexts, on_step)
                    if needed and self.published
                    else optimise_targets(
                        self.loaded.model,
                        self.arch,
                        placed,
                        contexts,
                        options,
                        on_step,
                        self.metric,
                        self.going_on,
                    )
                )
            standing = self._standing(targets)
            stuck = (
                best is not None and standing.score[0] == best.score[0] == len(urgency) and standing.score <= best.score
            )
            best = standing if self.options.published else max(best or standing, standing, key=lambda s: s.score)
            done = (targets.margin_before >= options.least_lead) | ~torch.isfinite(targets.loss_before)
            if r == rounds or ((stuck or bool(done.all())) and not self.options.published):
                break
            keep = self.options.preservation_decay**r
            if r:
                urgency[~(targets.margin_before > 0)] *= self.options.unreached_weight_growth
            with clock("solve") as step:
                if isinstance(self.solver, Trainer):
                    self._fit(self.solver, contexts, told(step, r))
                    continue
                ways = {PER_LAYER: self._solve, SPREAD: self._solve_spread}
                way = self._solve_published if self.published else ways[self.placement]
                way(contexts, targets, keep, urgency)
        assert best is not None
        for p in self.projections:
            self.set_weight(p, best.W[p.name])
            if self.turns:
                self.turns[p.name].pair = best.pairs[p.name]
        return best.targets

    def _ends_asked(self, contexts: Contexts) -> Contexts:
        """The end of the last word is asked of the facts that are answered as they shall be but for that."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        facts = running_on(model, tokenizer, contexts)
        if self.going_on is None and bool(facts.any()):
            self.going_on = going_on(tokenizer, model.get_output_embeddings().weight.shape[0])
        return ends_asked(contexts, facts)

    def _standing(self, targets: Targets) -> _Standing:
        """How far the batch is, as the model stands: facts that hold, then the lower loss (a lost fact counts 20 nats)."""
        held = int((targets.margin_before > 0).sum())
        loss = float(targets.loss_before.clamp(max=20).nan_to_num(20).mean())
        return _Standing((held, -loss), targets, dict(self.W), {name: turns.pair for name, turns in self.turns.items()})

    def _solve(self, contexts: Contexts, targets: Targets, keep: float, urgency: Tensor) -> None:
        """Bring every edited layer, lowest first, to its own targets.

        Args:
            keep: scales what must keep still. urgency: (facts,) weight of each fact.
        """
        rows, fact = contexts.edit_rows, contexts.fact[contexts.edit_rows]
        used = torch.isfinite(targets.loss).to(fact.device)[fact]
        if not bool(used.any()):
            return
        weight = _shares(fact[used]) * urgency.to(fact.device)[fact[used]]
        missing: Tensor | float = 0.0  # what lower layers could not reach is asked of the next
        for i, p in enumerate(self.projections):
            K = self._keys(p, contexts, rows[used])
            V = targets.V[i].to(K)[used.to(K.device)].T + missing
            self.set_weight(p, self._solved(p, keep, Columns(K, V, weight.to(K))))
            missing = V - self.W[p.name] @ K

    def _solve_spread(self, contexts: Contexts, targets: Targets, keep: float, urgency: Tensor) -> None:
        """One residual at the topmost edited layer's hidden state, an equal share to each layer below (MEMIT §4.3).

        Keys and values are means over a fact's contexts there, so each fact is one column.
        """
        top, rows = self.projections[-1], contexts.edit_rows
        used = torch.isfinite(targets.loss).to(rows.device)[contexts.fact[rows]]
        rows = rows[used]
        if not len(rows):
            return
        facts, fact = contexts.fact[rows].unique(return_inverse=True)
        mean = torch.zeros(int(fact.max()) + 1, len(fact), dtype=torch.float64, device=fact.device)
        mean[fact, torch.arange(len(fact), device=fact.device)] = _shares(fact)  # (n, rows)
        average = mean.to(self.W[top.name]).T
        batch, subject = contexts.batch.rows(rows), contexts.token[rows]
        written = self.W[top.name] @ self._keys(top, contexts, rows)  # (d, rows)
        shift = targets.V[0].to(written)[used.to(written.device)].T - written
        wanted: Tensor | None = None
        for i, p in enumerate(self.projections):
            hidden = hidden_at(self.loaded.model, self.arch, top.layer, batch, subject).to(shift).T
            wanted = hidden + shift if wanted is None else wanted
            K = self._keys(p, contexts, rows) @ average
            V = self.W[p.name] @ K + (wanted - hidden) @ average / (len(self.projections) - i)
            self.set_weight(p, self._solved(p, keep, Columns(K, V, urgency.to(K)[facts.to(K.device)])))

    def _mean(self, fact: Tensor) -> Tensor:
        return averages(fact, self.solver.published.bare)

    def _published_targets(self, contexts: Contexts, on_step: Callable[[int, int], None]) -> Targets:
        model, top, site = self.loaded.model, self.projections[-1], self.solver.published.site
        return published_targets(model, self.arch, top, contexts, self.options.targets, site, on_step)

    def _solve_published(self, contexts: Contexts, targets: Targets, keep: float, urgency: Tensor) -> None:
        """One residual at the topmost edited layer's hidden state, the bare prompt's; each layer, lowest first, is asked for
        an equal share of what is still missing.
        """
        assert isinstance(self.solver, Solver)
        top, before = self.projections[-1], dict(self.W)
        fact = contexts.fact[contexts.edit_rows]
        used = torch.isfinite(targets.loss).to(fact.device)
        if not bool(used.any()):
            return
        bare, mean = bare_rows(contexts)[used], self._mean(fact)[used]  # (n, rows)
        delta = targets.V[0][used].to(self.W[top.name]).T
        batch, subject, wanted = contexts.batch.rows(bare), contexts.token[bare], None
        for i, p in enumerate(self.projections):
            hidden = hidden_at(self.loaded.model, self.arch, top.layer, batch, subject).to(delta).T
            wanted = hidden + delta if wanted is None else wanted
            K = self._keys(p, contexts, contexts.edit_rows) @ mean.to(delta).T
            V = self.W[p.name] @ K + (wanted - hidden) / (len(self.projections) - i)
            columns = Columns(K, V, urgency.to(K)[used.to(K.device)])
            self.set_weight(p, self._solved(p, keep, columns, self._keys(p, contexts, bare)))
        for p in self.projections:
            W = self.solver.settle(before[p.name], self.W[p.name], self.solver_options)
            if W is not self.W[p.name]:
                self.set_weight(p, W)

    def _fit(self, trainer: Trainer, contexts: Contexts, on_step: Callable[[int, int], None]) -> None:
        """Let a method train on the model itself."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        problem = ModelProblem(
            model, self.arch, self.projections, contexts, self.W, self.solver_options, self.editor, self.text,
            self.earlier.contexts, self.carried, tokenizer.eos_token_id, self.options.seed, on_step,
        )  # fmt: skip
        W = trainer.fit(problem)
        for p in self.projections:
            self.set_weight(p, W[p.name])

    def _keys(self, p: Projection, contexts: Contexts, rows: Tensor) -> Tensor:
        """Keys (p, rows) of some rows of the contexts at their subjects, float64."""
        (k,) = contexts.keys(self.loaded.model, [p], rows)
        return k.to(self.W[p.name]).T

    def _problem(self, p: Projection, keep: float, columns: Columns) -> LayerProblem:
        """One layer's problem for these keys and values."""
        C, W = self.C[p.name], self.W[p.name]
        nothing = W.new_zeros(1)
        P, Q = self.moments.get(p.name) or (nothing.expand(C.shape), nothing.expand(W.shape))
        P, Q = (x if keep == 1 else keep * x for x in (P.to(W), Q.to(W)))
        K, V, weight = columns.K, columns.V, columns.weight
        return LayerProblem(W, self._base(p), C, P, Q, K, V, weight, self.solver_options, p.name, keep)

    def _solved(self, p: Projection, keep: float, columns: Columns, bare: Tensor | None = None) -> Tensor:
        """The weight (d, p) for these keys and values; ``bare``: LayerProblem's."""
        if isinstance(self.solver, Turner) and self.turns:
            earlier = self.columns.get(p.name)
            W = self.turns[p.name].solve(self.solver, self.C, columns, earlier, keep, self.solver_options)
        else:
            assert isinstance(self.solver, Solver)
            problem = replace(self._problem(p, keep, columns), bare=bare)
            W = self.solver.update(problem)
            if not self.published:  # there it is once a batch
                W = self.solver.settle(problem.W, W, problem.options)
        if not bool(torch.isfinite(W).all()):
            fix = "try --dtype float32"
            raise EditFailed("the solve gave numbers that are not finite", where=p.name, fix=fix)
        return W

    def set_weight(self, p: Projection, W: Tensor) -> None:
        """W (d, p) float64 is the weight from now on."""
        self.W[p.name] = W
        set_weight(self.loaded.model, p, W)

    def finish(self) -> dict[str, Change]:
        """What the edit comes to, as a patch holds it."""
        if self.turns:
            return {name: of_rotations(*turns.factors(self.side)) for name, turns in self.turns.items()}
        for p in self.projections:
            W = self.solver.finish(self._base(p), self.W[p.name], self.solver_options)
            if W is not self.W[p.name]:
                self.set_weight(p, W)
        wanted = self.solver.form(self.options.form) != "dense" and self.solver.side != "additive"
        changes = self._compact() if wanted and self.earlier.contexts is not None else None
        if changes is None:
            self.compaction = {}
            changes = {p.name: change_between(self._base(p), self.W[p.name], self.side) for p in self.projections}
        return changes

    def _use(self, changes: Mapping[str, Change]) -> None:
        for p in self.projections:
            set_weight(self.loaded.model, p, changed([changes[p.name]], self.W0[p.name]))

    def _base(self, p: Projection) -> Tensor:
        """The base weight (d, p) where its solves are done."""
        return self.W0[p.name].to(self.W[p.name])

    def _compact(self) -> dict[str, Change] | None:
        """The changes in compact form, the tolerance halved until no fact is lost by it; None where some still are.

        A layer is dense where that is smaller.
        """
        held, seen, tolerance = self.earlier.held(), self.earlier.seen(), self.options.compaction
        for _ in range(TIGHTENED):
            changes = {}
            for p in self.projections:
                base, W = self._base(p), self.W[p.name]
                A = self.C[p.name].to(W)
                A.diagonal().add_(1e-3 * A.trace() / p.p)
                A.add_(seen[p.name].to(W))
                found = compact_change(base, W, A, self.side, tolerance)
                changes[p.name], self.compaction[p.name] = found or (change_between(base, W, self.side), 0.0)
            self._use(changes)
            if self.earlier.held() >= KEPT * held:
                return changes
            tolerance /= 2
        return changes if self.options.form == "compact" else None


def _metric(G: Tensor) -> Tensor:
    """The inverse (d, d) float32 of G, raised by a share of its mean diagonal: what the corpus did not ask is not free."""
    G = G.clone()
    G.diagonal().add_(DAMPING * G.diagonal().mean().clamp_min(1e-20))
    return torch.linalg.inv(G).float()


def _shares(fact: Tensor) -> Tensor:
    """Weights of rows so that each fact's sum to 1; fact (rows,) int64."""
    return 1.0 / torch.bincount(fact).double()[fact]
