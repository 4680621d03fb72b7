"""Facts to patch: the whole edit, told in :func:`edit`.

Batches of facts are edited one after the other. For each batch, rounds of: find what the edited layers should write so
that the model says the new objects (targets.py), then bring every edited layer, lowest first, towards it (solvers/); what
a layer could not reach is handed to the next, and the next round starts from the model as it then is. Weights are kept
in float64 and rounded once into the live model, which is put back when the edit is done.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosectl import __version__
from mosectl.arch import Architecture, Projection, disk_names, resolve
from mosectl.change import Change, change_between, changed
from mosectl.errors import EditFailed, UsageError
from mosectl.evaluate import Interview, Scores, answer, compare, interview, says
from mosectl.facts import Fact, fact_from_dict, read_facts
from mosectl.fingerprint import fingerprint
from mosectl.forward import hidden_at, keys_at
from mosectl.journal import read_journal
from mosectl.layers import LayerScore, choose_layers, parse_layers, score_layers
from mosectl.live import Loaded, load, set_weight, solve_device, weight_of
from mosectl.metrics import Stability, stability
from mosectl.patch import BaseTensor, Patch, PatchFact
from mosectl.solvers import LayerProblem, method
from mosectl.stats import Corpus, read_corpus, second_moments
from mosectl.targets import (
    Contexts,
    TargetOptions,
    Targets,
    build_contexts,
    optimise_targets,
)

OnStep = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class EditOptions:
    """How to edit; the defaults are those measured for the default method (docs/LOG.md), see :func:`default_options`."""

    method: str = "isospectral"
    layers: str = "auto"  # "auto" or "3,4,5"
    batch_size: int = 0  # facts edited together; 0 = all
    rounds: int = 8  # times targets and solve alternate in a batch, at most
    relax: float = 1.0  # each round weighs what must keep still by this factor less, for the facts that still resist
    prefixes: int = 2  # pieces of text put before the prompt, besides none
    protect: float = 50.0  # weight of each earlier fact against a new one
    seed: int = 0
    chat: bool = False
    corpus: str | None = None  # None = embedded
    solver: Mapping[str, float] = field(default_factory=dict)  # the method's own options
    targets: TargetOptions = field(default_factory=TargetOptions)


def options_from(settings: Sequence[str], **given: Any) -> EditOptions:
    """EditOptions from "name=number" settings of the solver, the targets or the edit; None among ``given`` = default.

    Raises:
        UsageError: an unknown name, or not a number.
    """
    solver = method(given.get("method") or EditOptions.method)
    known = {f.name: f.type for f in fields(TargetOptions)}
    own = {"prefixes": "int", "protect": "float", "relax": "float"}
    found: dict[str, dict[str, Any]] = {"solver": {}, "targets": {}, "edit": {}}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            number = int(text) if "int" in (known.get(name), own.get(name)) else float(text)
        except ValueError:
            raise UsageError(f"--set {setting}: not a number", fix="write --set name=number") from None
        place = "solver" if name in solver.defaults else "targets" if name in known else "edit" if name in own else None
        if place is None or number < 0 or number != number:
            names = ", ".join((*solver.defaults, *known, *own))
            raise UsageError(f"--set {setting}: no such setting, or out of range", fix=f"settings: {names}")
        found[place][name] = number
    usual = default_options(solver.name)
    given = {k: v for k, v in given.items() if v is not None} | found["edit"]
    return replace(usual, **given, solver=found["solver"], targets=replace(usual.targets, **found["targets"]))


def default_options(name: str = EditOptions.method) -> EditOptions:
    """The measured defaults of method ``name``.

    Raises:
        UsageError: no such method.
    """
    settings, targets = dict(method(name).settings), TargetOptions()
    aims = {f.name: settings.pop(f.name) for f in fields(TargetOptions) if f.name in settings}
    return EditOptions(method=name, **settings, targets=replace(targets, **aims))


@dataclass(frozen=True)
class FactResult:
    """What became of one fact."""

    fact: Fact
    before: str
    after: str
    probability_before: float
    probability_after: float
    status: str  # "changed", "already known", "not reached", "not finite"
    loss: float  # right after its batch: −log P(target), nats a token, mean over the prefixes


@dataclass(frozen=True)
class EditResult:
    """The patch, and everything measured while it was made."""

    patch: Patch
    facts: tuple[FactResult, ...]
    scores: Scores
    stability: tuple[Stability, ...]  # the changed W against W, both in float32
    layers: tuple[LayerScore, ...]
    corpus_tokens: int
    seconds: dict[str, float]  # by phase


def edit(
    facts: str | Path | Sequence[Fact | Mapping[str, Any]],
    model: Any,
    tokenizer: Any = None,
    *,
    options: EditOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_step: OnStep | None = None,
) -> EditResult:
    """Compute a patch that makes ``model`` say each fact's new object. The model itself is left as it was.

    Args:
        facts: a facts file, or facts, or dicts with the fields of one.
        model: a folder, a hub id, or a loaded causal language model with its ``tokenizer``.
        on_step: called with (phase, done, total) as the work goes on.
    Raises:
        FactsError, ModelError, UsageError, HubError; EditFailed if no answer changed or a number was not finite.
    """
    options = options or EditOptions()
    solver = method(options.method)
    if unknown := set(options.solver) - set(solver.defaults):
        raise UsageError(
            f"method '{solver.name}' has no option '{min(unknown)}'", fix=f"it has: {', '.join(solver.defaults)}"
        )
    checked = _facts(facts)
    clock = _Clock(on_step)
    with clock("load"):
        loaded = load(model, revision=revision, device=device, dtype=dtype) if isinstance(model, str | Path) else model
        loaded = loaded if isinstance(loaded, Loaded) else Loaded(loaded, tokenizer, None)
        if loaded.tokenizer is None:
            raise UsageError("a loaded model needs its tokenizer", fix="call edit(facts, model, tokenizer)")
        arch = resolve(loaded.model)
        corpus = read_corpus(options.corpus)
    scores: list[LayerScore] = []
    with clock("layers"):
        projections, scores = _choose(loaded, arch, checked, options)
    with clock("statistics") as step:
        moments = second_moments(loaded.model, loaded.tokenizer, projections, corpus, on_step=step)
    with clock("ask before") as step:
        before = interview(loaded.model, loaded.tokenizer, checked, chat=options.chat, on_step=step)
    run = _Run(loaded, arch, projections, moments.C, options)
    with run.restored():
        losses = run.edit(checked, _prefixes(corpus, options), clock)
        with clock("solve"):
            changes = run.finish()
        with clock("ask after") as step:
            after = interview(loaded.model, loaded.tokenizer, checked, chat=options.chat, on_step=step)
    results = _results(checked, before, after, losses)
    _refuse_failure(results)
    with clock("check"):
        drifts = tuple(run.stability(changes))
        scored = compare(checked, before, after)
        patch = _patch(loaded, arch, run, changes, results, scored, drifts, options, corpus)
    return EditResult(patch, results, scored, drifts, tuple(scores), moments.tokens, clock.seconds)


def _facts(facts: str | Path | Sequence[Fact | Mapping[str, Any]]) -> list[Fact]:
    if isinstance(facts, str | Path):
        return list(read_facts(facts).facts)
    out = [f if isinstance(f, Fact) else fact_from_dict(dict(f), f"fact {i + 1}") for i, f in enumerate(facts)]
    if not out:
        raise UsageError("there is no fact to edit", fix="give at least one")
    return out


class _Clock:
    """Seconds spent in each phase, and the progress callback bound to it."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_step = on_step

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[int, int], None]]:
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


def _choose(
    loaded: Loaded, arch: Architecture, facts: Sequence[Fact], options: EditOptions
) -> tuple[list[Projection], list[LayerScore]]:
    chosen, scores = parse_layers(options.layers, len(arch.projections)), []
    if chosen is None:
        contexts = build_contexts(loaded.model, loaded.tokenizer, facts[:64], [""], chat=options.chat)
        rows = contexts.edit_rows
        scores = score_layers(loaded.model, arch, contexts.batch.rows(rows), contexts.subject[rows])
        chosen = choose_layers(scores)
    return [p for p in arch.projections if p.layer in chosen], scores


def _prefixes(corpus: Corpus, options: EditOptions) -> list[str]:
    """What to put before prompts: nothing, and openings of some texts; an edit must hold wherever the subject stands."""
    chance = random.Random(options.seed)
    texts = [t for t in corpus.texts if len(t.split()) >= 3] or list(corpus.texts)
    picked = chance.sample(texts, min(options.prefixes, len(texts)))
    openings = [" ".join(t.split()[: chance.randint(3, 7)]).rstrip(" .,;:") for t in picked]
    return ["", *(f"{text}. " for text in openings)]


@dataclass(frozen=True)
class _Standing:
    """One round's outcome, to come back to."""

    score: tuple[int, float]
    targets: Targets
    W: dict[str, Tensor]


class _Run:
    """The edited layers of one live model: base weight, weight so far, statistics and earlier edits, by module path."""

    def __init__(
        self,
        loaded: Loaded,
        arch: Architecture,
        projections: list[Projection],
        C: Mapping[str, Tensor],
        options: EditOptions,
    ) -> None:
        self.loaded, self.arch, self.projections, self.options = loaded, arch, projections, options
        self.solver = method(options.method)
        self.solver_options = {**self.solver.defaults, **options.solver}
        self.W0 = {p.name: weight_of(loaded.model, p).detach().clone() for p in projections}  # as stored
        place = torch.empty(0, dtype=torch.float64, device=solve_device(self.W0[projections[0].name].device))
        self.W = {p.name: p.oriented(self.W0[p.name]).to(place) for p in projections}  # (d, p)
        self.C = {p.name: C[p.name].to(place) for p in projections}  # (p, p)
        self.P = {p.name: torch.zeros_like(self.C[p.name]) for p in projections}  # Σ k kᵀ of earlier edits
        self.Q = {p.name: torch.zeros_like(self.W[p.name]) for p in projections}  # Σ v kᵀ of earlier edits

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the base weights back at the end, whatever happened."""
        try:
            yield
        finally:
            for p in self.projections:
                with torch.no_grad():
                    weight_of(self.loaded.model, p).copy_(self.W0[p.name])

    def edit(self, facts: Sequence[Fact], prefixes: Sequence[str], clock: _Clock) -> list[float]:
        """Edit all facts batch by batch; returns the loss of each right after its batch, nats a token."""
        size = self.options.batch_size or len(facts)
        losses: list[float] = []
        for start in range(0, len(facts), size):
            batch = facts[start : start + size]
            contexts = build_contexts(self.loaded.model, self.loaded.tokenizer, batch, prefixes, chat=self.options.chat)
            losses += self._batch(contexts, clock, start, len(facts)).loss_before.tolist()
            self._protect(contexts)
        return losses

    def _batch(self, contexts: Contexts, clock: _Clock, first: int, total: int) -> Targets:
        """Alternate targets and solve until every fact holds by itself; of at most ``rounds`` keep the best."""
        best: _Standing | None = None
        n, rounds = int(contexts.fact.max()) + 1, self.options.rounds
        placed = self.projections[-1:] if self.solver.spread else self.projections
        for r in range(rounds + 1):
            with clock("targets") as step:

                def on_step(done: int, of: int, r: int = r, step: Callable[[int, int], None] = step) -> None:
                    step(first * rounds + r * n + done * n // of, total * rounds)

                options = self.options.targets if r < rounds else replace(self.options.targets, steps=0)
                targets = optimise_targets(self.loaded.model, self.arch, placed, contexts, options, on_step)
            best = max(best or self._standing(targets), self._standing(targets), key=lambda s: s.score)
            if r == rounds or bool((targets.steps == 0).all()):
                break
            with clock("solve"):
                (self._solve_spread if self.solver.spread else self._solve)(contexts, targets, self.options.relax**r)
        assert best is not None
        for p in self.projections:
            self._set(p, best.W[p.name])
        return best.targets

    def _standing(self, targets: Targets) -> _Standing:
        """How far the batch is, as the model stands: facts that hold, then the lower loss (a lost fact counts 20 nats)."""
        held = int((targets.margin_before > 0).sum())
        loss = float(targets.loss_before.clamp(max=20).nan_to_num(20).mean())
        return _Standing((held, -loss), targets, dict(self.W))

    def _solve(self, contexts: Contexts, targets: Targets, keep: float) -> None:
        """Bring every edited layer, lowest first, to its own targets; ``keep`` scales what must keep still."""
        rows, fact = contexts.edit_rows, contexts.fact[contexts.edit_rows]
        used = torch.isfinite(targets.loss).to(fact.device)[fact]
        missing: Tensor | float = 0.0
        for i, p in enumerate(self.projections):
            K = self._keys(p, contexts, rows[used])
            V = (
                targets.V[i].to(K)[used.to(K.device)].T + missing
            )  # what lower layers could not reach is asked of this one
            self._set(p, self._solved(p, K, V, _shares(fact[used]).to(K), keep))
            missing = V - self.W[p.name] @ K

    def _solve_spread(self, contexts: Contexts, targets: Targets, keep: float) -> None:
        """One residual at the topmost edited layer's hidden state, an equal share to each layer below (MEMIT §4.3).

        Keys and values are means over a fact's contexts there, so each fact is one column.
        """
        top, rows = self.projections[-1], contexts.edit_rows
        rows = rows[torch.isfinite(targets.loss).to(rows.device)[contexts.fact[rows]]]
        _, fact = contexts.fact[rows].unique(return_inverse=True)
        mean = torch.zeros(int(fact.max()) + 1, len(fact), dtype=torch.float64, device=fact.device)
        mean[fact, torch.arange(len(fact), device=fact.device)] = _shares(fact)  # (n, rows)
        batch, subject = contexts.batch.rows(rows), contexts.subject[rows]
        finite = torch.isfinite(targets.loss).to(contexts.fact.device)[contexts.fact[contexts.edit_rows]]
        H = self.W[top.name] @ self._keys(top, contexts, rows)
        shift = targets.V[0].to(H)[finite.to(H.device)].T - H  # (d, rows)
        hidden = hidden_at(self.loaded.model, self.arch, top.layer, batch, subject).to(H).T
        wanted = hidden + shift
        for i, p in enumerate(self.projections):
            hidden = hidden_at(self.loaded.model, self.arch, top.layer, batch, subject).to(H).T
            average = mean.to(H).T
            K = self._keys(p, contexts, rows) @ average
            V = self.W[p.name] @ K + (wanted - hidden) @ average / (len(self.projections) - i)
            self._set(p, self._solved(p, K, V, torch.ones(K.shape[1]).to(K), keep))

    def _keys(self, p: Projection, contexts: Contexts, rows: Tensor) -> Tensor:
        """Keys (p, rows) of some rows of the contexts at their subjects, float64."""
        (k,) = keys_at(self.loaded.model, [p], contexts.batch.rows(rows), contexts.subject[rows])
        return k.to(self.C[p.name]).T

    def _solved(self, p: Projection, K: Tensor, V: Tensor, weight: Tensor, keep: float) -> Tensor:
        name = p.name
        C, P, Q = keep * self.C[name], keep * self.P[name], keep * self.Q[name]
        base = p.oriented(self.W0[name]).to(C)
        W = self.solver.solve(LayerProblem(self.W[name], base, C, P, Q, K, V, weight, self.solver_options))
        if not bool(torch.isfinite(W).all()):
            raise EditFailed("the solve gave numbers that are not finite", where=name, fix="try --dtype float32")
        return W

    def _set(self, p: Projection, W: Tensor) -> None:
        self.W[p.name] = W
        set_weight(self.loaded.model, p, W)

    def _protect(self, contexts: Contexts) -> None:
        """From now on these facts' outputs keep still."""
        rows = contexts.edit_rows
        share = self.options.protect * (int(contexts.fact.max()) + 1) / len(rows)
        for p in self.projections:
            K = self._keys(p, contexts, rows)
            self.P[p.name] = self.P[p.name] + share * K @ K.T
            self.Q[p.name] = self.Q[p.name] + share * self.W[p.name] @ K @ K.T

    def finish(self) -> dict[str, Change]:
        """What the edit comes to, as a patch holds it; the live weights are set to just that."""
        changes = {}
        for p in self.projections:
            base = p.oriented(self.W0[p.name]).to(self.W[p.name])
            W = self.W[p.name]
            if self.solver.finish:
                W = self.solver.finish(base, W, self.solver_options)
            changes[p.name] = change_between(base, W, self.solver.side)
            set_weight(self.loaded.model, p, changes[p.name].apply(base.cpu()))
        return changes

    def stability(self, changes: Mapping[str, Change]) -> Iterator[Stability]:
        """Norm, condition number and spectrum of the changed weights against the base, as float32 matrices."""
        for p in self.projections:
            W = p.oriented(self.W0[p.name]).float().cpu()
            yield stability(p.weight_name, W, changed([changes[p.name]], W))


def _shares(fact: Tensor) -> Tensor:
    """Weights of rows so that each fact's sum to 1; fact (rows,) int64."""
    return 1.0 / torch.bincount(fact).double()[fact]


def _results(
    facts: Sequence[Fact], before: Interview, after: Interview, losses: Sequence[float]
) -> tuple[FactResult, ...]:
    out = []
    for fact, old, new, loss in zip(facts, before.answers, after.answers, losses, strict=True):
        if not torch.isfinite(torch.tensor(loss)):
            status = "not finite"
        elif not says(new.text, fact.target_new):
            status = "not reached"
        else:
            status = "already known" if says(old.text, fact.target_new) else "changed"
        out.append(FactResult(fact, answer(old.text), answer(new.text), old.probability, new.probability, status, loss))
    return tuple(out)


def _refuse_failure(results: Sequence[FactResult]) -> None:
    """An edit that changed nothing is an error, not a patch."""
    if any(r.status == "changed" for r in results):
        return
    if all(r.status == "already known" for r in results):
        raise EditFailed("nothing changed: the model already says every new target", fix="no patch is needed")
    if any(r.status == "not finite" for r in results):
        raise EditFailed("nothing changed: the loss is not finite", fix="try --dtype float32")
    raise EditFailed(
        f"nothing changed: none of {len(results)} facts reached its target",
        fix="try other --layers, more --rounds, or see: mosectl check FACTS --model MODEL",
    )


def _patch(
    loaded: Loaded,
    arch: Architecture,
    run: _Run,
    changes: Mapping[str, Change],
    results: Sequence[FactResult],
    scores: Scores,
    drifts: Sequence[Stability],
    options: EditOptions,
    corpus: Corpus,
) -> Patch:
    import transformers

    journal = read_journal(loaded.checkpoint.folder) if loaded.checkpoint else None
    recorded = asdict(options)
    recorded["solver"] = run.solver_options
    recorded["layers"] = [p.layer for p in run.projections]
    recorded["corpus"] = {"name": corpus.name, "sha256": corpus.sha256}
    recorded["dtype"] = str(next(iter(run.W0.values())).dtype).removeprefix("torch.")
    for key in ("method", "seed"):  # these stand in the record itself
        del recorded[key]
    return Patch(
        changes=changes,
        method=run.solver.name,
        side=run.solver.side,
        options=recorded,
        model=loaded.checkpoint.model if loaded.checkpoint else _model_name(loaded.model),
        revision=loaded.checkpoint.revision if loaded.checkpoint else None,
        model_type=arch.model_type,
        base=_bases(loaded, arch, run),
        facts=tuple(_patch_fact(r) for r in results),
        metrics={"scores": _rounded(asdict(scores)), "stability": [_rounded(asdict(s)) for s in drifts]},
        seed=options.seed,
        versions={
            "mosectl": __version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        parents=tuple(p.id for p in journal.patches) if journal else (),
    )


def _model_name(model: Any) -> str:
    return Path(str(getattr(model.config, "_name_or_path", "") or "model")).name


def _bases(loaded: Loaded, arch: Architecture, run: _Run) -> dict[str, BaseTensor]:
    """Fingerprints of the weights as the checkpoint stores them; of the live ones where there is no checkpoint."""
    names = disk_names(arch, loaded.checkpoint.tensors) if loaded.checkpoint else {}
    return {
        p.name: fingerprint(
            p.weight_name, loaded.checkpoint.read(names[p.name]) if loaded.checkpoint else run.W0[p.name]
        )
        for p in run.projections
    }


def _patch_fact(r: FactResult) -> PatchFact:
    return PatchFact(
        prompt=r.fact.prompt,
        subject=r.fact.subject,
        target_new=r.fact.target_new,
        before=r.before,
        after=r.after,
        probability_before=round(r.probability_before, 6),
        probability_after=round(r.probability_after, 6),
        status=r.status,
    )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Six significant digits: more would be noise."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
