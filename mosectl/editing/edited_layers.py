"""A run's edited layers: their weights in the live model, what must keep still, and the solves that change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mosectl.editing.contexts import Contexts
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
from mosectl.editing.published import averages, bare_rows
from mosectl.editing.second_moments import Moments
from mosectl.editing.targets import Targets
from mosectl.editing.turns import LayerTurns, Pair, from_tensors
from mosectl.errors import EditFailed
from mosectl.hypernetwork.file import Editor
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection
from mosectl.model.weights import set_weight, solve_device, weight_of
from mosectl.patch.change import Change, change_between, changed, of_rotations

DAMPING = 0.1  # of G
TIGHTENED = 4  # tolerances tried for the compact form
KEPT = 0.99  # the share of answers that it has to keep


@dataclass(frozen=True)
class Standing:
    """How the layers are at one moment, to come back to."""

    W: Mapping[str, Tensor]  # (d, p) float64, the weights by module path
    pairs: Mapping[str, Pair | None]  # the present batch's rotations by module path, where compact ones are sought
    carried: Mapping[str, Tensor]  # what the method carries from batch to batch


class EditedLayers:
    """Base weight, weight so far, statistics and earlier edits of each edited layer, by module path."""

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        projections: list[Projection],
        moments: Moments,
        options: EditOptions,
        editor: Editor | None = None,
    ) -> None:
        self.model, self.arch, self.projections, self.options = model, arch, projections, options
        self.solver, self.editor = method(options.method), editor
        own = options.placement == "method" or not self.solver.searches
        self.placement = self.solver.placement if own else options.placement
        self.side = self.solver.side_on(projections)
        self.published = options.published and self.solver.searches
        self.solver_options = {**self.solver.defaults, **options.solver}
        place = torch.empty(0, dtype=torch.float64, device=solve_device(weight_of(model, projections[0]).device))
        # What one layer's solve takes is on its device, the rest waits on the host: together they can exceed a GPU.
        self.stored = {p.name: weight_of(model, p).detach().clone().cpu() for p in projections}
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
            self.metric = {p.name: metric_of(moments.G[p.name].to(place)) for p in projections}
        self.earlier = Earlier(model, projections, self._mean if self.published else None)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # P and Q of earlier edits, as the present batch found them
        self.compaction: dict[str, float] = {}  # what the patch's form leaves out of the effect, by module path

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the base weights back at the end, whatever happened."""
        try:
            yield
        finally:
            for p in self.projections:
                with torch.no_grad():
                    weight_of(self.model, p).copy_(self.stored[p.name])

    def set_weight(self, p: Projection, W: Tensor) -> None:
        """W (d, p) float64 is the weight from now on."""
        self.W[p.name] = W
        set_weight(self.model, p, W)

    # Batches

    def standing(self) -> Standing:
        """How the layers are now."""
        pairs = {name: turns.pair for name, turns in self.turns.items()}
        return Standing(dict(self.W), pairs, dict(self.carried))

    def go_back(self, to: Standing) -> None:
        """The layers are as they were in the present batch, or just before it."""
        self.carried = dict(to.carried)
        for p in self.projections:
            self.set_weight(p, to.W[p.name])
            if self.turns:
                self.turns[p.name].pair = to.pairs[p.name]

    def keep(self) -> None:
        """The present batch stays."""
        for p in self.projections if self.turns else ():
            self.set_weight(p, self.turns[p.name].keep())

    def resume(
        self, W: Mapping[str, Tensor], turns: Mapping[str, Mapping[str, Tensor]], carried: Mapping[str, Tensor]
    ) -> None:
        """Go on from the weights (d, p) and rotations of an interrupted run, by module path, and what its method carries
        (resume.State).
        """
        place = self.W[self.projections[0].name].device
        self.carried = {name: x.to(place) for name, x in carried.items()}
        for p in self.projections:
            now = W[p.name].to(self.W[p.name])
            if self.turns:
                now = self.turns[p.name].take(*from_tensors({n: x.to(now) for n, x in turns[p.name].items()}))
            self.set_weight(p, now)

    def remember(self, weight: float) -> None:
        """What earlier edits' facts, each of this weight, ask of the coming solves."""
        self.moments = self.earlier.moments(weight) if weight else {}

    # Solves

    def solve(self, contexts: Contexts, targets: Targets, keep: float, urgency: Tensor) -> None:
        """Bring the layers to these targets.

        Args:
            keep: scales what must keep still. urgency: (facts,) weight of each fact.
        """
        ways = {PER_LAYER: self._solve_each, SPREAD: self._solve_spread}
        way = self._solve_published if self.published else ways[self.placement]
        way(contexts, targets, keep, urgency)

    def _solve_each(self, contexts: Contexts, targets: Targets, keep: float, urgency: Tensor) -> None:
        """Bring every edited layer, lowest first, to its own targets."""
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
        written = self.W[top.name] @ self._keys(top, contexts, rows)  # (d, rows)
        shift = targets.V[0].to(written)[used.to(written.device)].T - written
        wanted: Tensor | None = None
        for i, p in enumerate(self.projections):
            hidden = contexts.hidden(self.model, self.arch, top.layer, rows).to(shift).T
            wanted = hidden + shift if wanted is None else wanted
            K = self._keys(p, contexts, rows) @ average
            V = self.W[p.name] @ K + (wanted - hidden) @ average / (len(self.projections) - i)
            self.set_weight(p, self._solved(p, keep, Columns(K, V, urgency.to(K)[facts.to(K.device)])))

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
        wanted: Tensor | None = None
        for i, p in enumerate(self.projections):
            hidden = contexts.hidden(self.model, self.arch, top.layer, bare).to(delta).T
            wanted = hidden + delta if wanted is None else wanted
            K = self._keys(p, contexts, contexts.edit_rows) @ mean.to(delta).T
            V = self.W[p.name] @ K + (wanted - hidden) / (len(self.projections) - i)
            columns = Columns(K, V, urgency.to(K)[used.to(K.device)])
            self.set_weight(p, self._solved(p, keep, columns, self._keys(p, contexts, bare)))
        for p in self.projections:
            W = self.solver.settle(before[p.name], self.W[p.name], self.solver_options)
            if W is not self.W[p.name]:
                self.set_weight(p, W)

    def fit(
        self, trainer: Trainer, contexts: Contexts, ending: int | None, on_step: Callable[[int, int], None]
    ) -> None:
        """Let a method train on the model itself; ``ending``: the tokenizer's end-of-text token."""
        problem = ModelProblem(
            self.model, self.arch, self.projections, contexts, self.W, self.solver_options, self.editor, self.text,
            self.earlier.contexts, self.carried, ending, self.options.seed, on_step,
        )  # fmt: skip
        W = trainer.fit(problem)
        for p in self.projections:
            self.set_weight(p, W[p.name])

    def _mean(self, fact: Tensor) -> Tensor:
        return averages(fact, self.solver.published.bare)

    def _keys(self, p: Projection, contexts: Contexts, rows: Tensor) -> Tensor:
        """Keys (p, rows) of some rows of the contexts at their subjects, float64."""
        (k,) = contexts.keys(self.model, [p], rows)
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
            earlier = self.moments.get(p.name)
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

    # The patch

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
            set_weight(self.model, p, changed([changes[p.name]], self.W0[p.name]))

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


def metric_of(G: Tensor) -> Tensor:
    """The inverse (d, d) float32 of G, raised by a share of its mean diagonal: what the corpus did not ask is not free."""
    G = G.clone()
    G.diagonal().add_(DAMPING * G.diagonal().mean().clamp_min(1e-20))
    return torch.linalg.inv(G).float()


def _shares(fact: Tensor) -> Tensor:
    """Weights of rows so that each fact's sum to 1; fact (rows,) int64."""
    return 1.0 / torch.bincount(fact).double()[fact]
