"""Facts to patch: the whole edit, told in :func:`edit`.

Batches of facts are edited one after the other. For each batch, rounds of: find what the edited layers should write so
that the model says the new objects (targets.py), then bring every edited layer, lowest first, towards it (methods/); what
a layer could not reach is handed to the next, and the next round starts from the model as it then is. Weights are kept
in float64 and rounded once into the live model, which is put back when the edit is done.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mosectl.checkpoints.base import stored_patches
from mosectl.checkpoints.live import changes_on
from mosectl.editing.advice import advice
from mosectl.editing.beforehand import Beforehand, chosen_beforehand
from mosectl.editing.contexts import build_contexts
from mosectl.editing.edited_layers import EditedLayers
from mosectl.editing.guard import Health, canaries
from mosectl.editing.layers import LAST, LayerScore, choose_layers, enough, score_layers
from mosectl.editing.methods import method
from mosectl.editing.options import EditOptions, trained_editor
from mosectl.editing.outcome import FactResult, fact_results, metrics_of, patch_of
from mosectl.editing.paraphrases import own_wordings
from mosectl.editing.prompt_tokens import add_prompts
from mosectl.editing.published import written_prefixes
from mosectl.editing.replies import note_text_alone
from mosectl.editing.resume import Progress
from mosectl.editing.second_moments import Moments, second_moments
from mosectl.editing.session import Session
from mosectl.errors import EditFailed, ModelError, NotFinite, UsageError
from mosectl.facts.corpus import Corpus, read_corpus
from mosectl.facts.probe import NotCounted
from mosectl.facts.records import Fact, as_facts
from mosectl.hypernetwork.file import Editor
from mosectl.linalg.spectrum import Stability, stability
from mosectl.measure.answers import Interview, Scores, compare, interview
from mosectl.measure.conditions import LOCALITY, conditions, counting
from mosectl.measure.groups import Share, moved, recorded, shares
from mosectl.measure.next_tokens import NextToken
from mosectl.measure.own_probes import own_probes
from mosectl.measure.probes import ProbeAnswer, probes_of
from mosectl.model.architecture import Architecture, resolve
from mosectl.model.edit_site import Projection
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded, load
from mosectl.model.moe import block_name
from mosectl.model.positions import window
from mosectl.model.weights import turns, weight_of, weights_of
from mosectl.patch.change import Change, changed
from mosectl.patch.file import Patch
from mosectl.patch.finite import all_zeros, check_weight
from mosectl.storage.progress import Clock, OnStep
from mosectl.text import notebook
from mosectl.text.jsonable import UNSAID


@dataclass(frozen=True)
class EditResult:
    """The patch, and everything measured while it was made."""

    patch: Patch
    facts: tuple[FactResult, ...] = field(repr=False)
    scores: Scores
    stability: tuple[Stability, ...] = field(repr=False)  # the changed W against W, both in float32
    layers: tuple[LayerScore, ...]
    stopped: str  # why the guard ended the run early; empty otherwise
    corpus_tokens: int
    seconds: dict[str, float]  # by phase
    interviews: tuple[Interview, Interview] = field(repr=False)  # before and after, of all probes
    # (Facts edited so far, health) after each batch that was kept; the base at 0.
    curve: tuple[tuple[int, Health], ...] = field(repr=False)
    remedy: str  # what may help where facts were not reached
    # The scores and those of groups of prompts, compared strictly and as QA does.
    shares: tuple[Share, ...] = field(default=(), repr=False)
    next_tokens: tuple[NextToken, ...] = ()  # how far what comes next moved: at locality prompts, in ordinary text
    # Every rephrasing and locality prompt that counts, answered before and after.
    probes: tuple[ProbeAnswer, ...] = field(default=(), repr=False)
    # Locality prompts whose conditions the model did not meet before.
    not_counted: tuple[NotCounted, ...] = field(default=(), metadata=UNSAID)

    def _repr_html_(self) -> str:
        return notebook.shown(self)


def edit(
    facts: str | Path | Sequence[Fact | Mapping[str, Any]],
    model: Any,
    tokenizer: Any = None,
    *,
    options: EditOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    refuse: bool = True,
    on_error: str = "fail",
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> EditResult:
    """Compute a patch that makes ``model`` say each fact's new object. The model itself is left as it was.

    Args:
        facts: a facts file, hf://datasets/user/repo, or facts, or dicts with the fields of one.
        model: a folder, a hub id, or a loaded causal language model with its ``tokenizer``.
        refuse: an edit that changed no answer is an error; False: it is returned like any other, for comparisons.
        on_error: facts and probes that are longer than the model can read: "fail", or "skip" them.
        progress: where the state after each batch is kept, to go on from after an interruption.
        on_step: called with (phase, done, total) as the work goes on; where it has a method ``batch``, that is called with
            a BatchDone (mosectl.storage.progress) after each of several batches, and a SlippedDone where some facts were
            edited again at the end.
    Raises:
        FactsError, ModelError, UsageError, HubError, OutputError.
        EditFailed: no answer changed, or a number was not finite.
    """
    options = options or EditOptions()
    solver, trained = method(options.method), trained_editor(options)
    if unknown := set(options.solver) - set(solver.defaults):
        what = f"method '{solver.name}' has no option '{min(unknown)}'"
        raise UsageError(what, fix=f"it has: {', '.join(solver.defaults)}")
    clock = Clock(on_step)
    check = Beforehand(as_facts(facts, "edit"), options, trained, progress, on_error)
    corpus = read_corpus(options.corpus)
    with clock("load"):
        if isinstance(model, str | Path):
            given = load(model, revision=revision, device=device, dtype=dtype, check=check)
        else:
            given = model if isinstance(model, Loaded) else Loaded(model, tokenizer, None)
            if given.tokenizer is None:
                raise UsageError("a loaded model needs its tokenizer", fix="call edit(facts, model, tokenizer)")
            check(given.model, given.tokenizer)
        ready = _ready(given, check.facts, corpus)
        if isinstance(model, str | Path):
            note_text_alone(ready.loaded.tokenizer, options, check.options)
        asked_for, loaded, checked, options = options.layers, ready.loaded, ready.facts, check.options
    done = _computed(ready, options, trained, clock, progress, refuse)
    edited = [p for p in ready.arch.projections if p.name in done.changes]
    on = changes_on(loaded.model, [(p, [done.changes[p.name]]) for p in edited])
    with made_by_the_edit(), on, clock("ask after") as step:
        after = interview(loaded.model, loaded.tokenizer, checked, on_step=step, **_asked(ready, options))
    results = fact_results(checked, done.before, after, done.losses, done.wordings, done.right_after)
    told = replace(options, layers=asked_for)
    remedy = advice(solver, told, len(done.layers.projections), len(checked), done.stopped)
    if refuse:
        _refuse_failure(results, remedy)
    with clock("check"):
        return _judged(ready, done, after, edited, results, clock.seconds, remedy)


def _judged(
    ready: _Ready,
    done: _Done,
    after: Interview,
    edited: Sequence[Projection],
    results: tuple[FactResult, ...],
    seconds: dict[str, float],
    remedy: str,
) -> EditResult:
    """Scores of the probes that count, drifts of the weights, and the patch that records them."""
    drifts = tuple(_stability(ready.loaded, edited, done.changes))
    count = counting(ready.facts, done.before.conditions, LOCALITY)
    counted = (count.facts, count.interview(done.before), count.interview(after))
    scored, felt = compare(*counted, done.wordings), (shares(*counted), moved(*counted))
    metrics = metrics_of(scored, recorded(*felt) | count.recorded(), drifts, done.layers.compaction)
    patch = patch_of(ready.loaded, ready.arch, ready.corpus, done.layers, done.changes, results, metrics)
    told = (done.stopped, done.tokens, seconds, (done.before, after), done.curve)
    return EditResult(
        patch, results, scored, drifts, done.scores, *told, remedy, *felt, probes_of(*counted), count.left_out
    )


def _asked(ready: _Ready, options: EditOptions) -> dict[str, Any]:
    """How both interviews are held."""
    probes = own_probes(ready.facts, options.chat)
    return {"chat": options.chat, "probes": probes, "texts": ready.corpus.texts}


@dataclass(frozen=True)
class _Ready:
    """What an edit works on."""

    loaded: Loaded
    arch: Architecture
    facts: list[Fact]  # that the model can read
    corpus: Corpus
    empty: Mapping[int, Projection]  # layers whose weight is nothing but zeros
    most: int  # tokens that the model reads at once


def _ready(loaded: Loaded, facts: list[Fact], corpus: Corpus) -> _Ready:
    """The model, whose weights are checked for what would stand in the way of an edit, and facts that it can read."""
    if away := next((n for n, p in loaded.model.named_parameters() if p.is_meta), ""):
        fix = "use more GPUs (--device balanced) or --dtype bfloat16; patches apply on disk whatever the size"
        raise ModelError("is offloaded: the model does not fit", where=away, fix=fix)
    if loaded.checkpoint:
        stored_patches(loaded.checkpoint)  # on top of which the patch will be
    arch = resolve(loaded.model)
    empty = {p.layer: p for p in arch.projections if _all_zeros(loaded, p)}
    return _Ready(loaded, arch, facts, corpus, empty, window(loaded.model).most)


@dataclass(frozen=True)
class _Done:
    """What the computation came to; the live model is as it was."""

    layers: EditedLayers
    changes: dict[str, Change]  # by module path
    losses: Sequence[float]
    right_after: Sequence[str]  # the answers right after each batch; none where one batch is the whole run
    before: Interview
    wordings: Sequence[tuple[str, ...]]
    scores: tuple[LayerScore, ...]
    tokens: int  # of the corpus
    stopped: str  # EditResult's
    curve: tuple[tuple[int, Health], ...]


def _computed(
    ready: _Ready,
    options: EditOptions,
    trained: Editor | None,
    clock: Clock,
    progress: Progress | None,
    refuse: bool,
) -> _Done:
    """Ask before, choose layers, take statistics, edit."""
    loaded, facts, model = ready.loaded, ready.facts, ready.loaded.model
    with clock("ask before") as step:
        needed = conditions(facts, LOCALITY)
        before = interview(model, loaded.tokenizer, facts, on_step=step, conditions=needed, **_asked(ready, options))
    if refuse and all(says(a.text, *f.targets) for a, f in zip(before.answers, facts, strict=True)):
        what = "nothing changed: the model already says every new target"
        raise EditFailed(what, fix="no patch is needed")
    with turns(model, ready.arch) as turned:
        with clock("layers"):
            projections, scores = _choose(loaded, turned, facts, options, trained)
            if found := next((ready.empty[p.layer] for p in projections if p.layer in ready.empty), None):
                raise all_zeros(found.weight_name, _where(loaded))
        with clock("statistics") as step:
            moments = Moments({}, {}, 0, False, math.inf)
            if method(options.method).needs_moments(options.form):
                folder = loaded.checkpoint.folder if loaded.checkpoint else None
                moments = second_moments(
                    model, loaded.tokenizer, projections, ready.corpus,
                    enough=enough(options), folder=folder, on_step=step,
                )  # fmt: skip
                if options.prompt_weight:
                    add_prompts(
                        moments, model, loaded.tokenizer, projections, facts, options.prompt_weight,
                        chat=options.chat, last=options.fact_token == LAST,
                    )  # fmt: skip
        with clock("wordings", len(facts)) as step:
            wordings = _wordings(loaded, facts, before, options, step)
        layers = EditedLayers(model, turned, projections, moments, options, trained)
        session = Session(loaded, layers)
        with layers.restored():
            session.watch(canaries(loaded.tokenizer, ready.corpus.texts, ready.most))
            with made_by_the_edit():
                losses = session.edit(facts, _prefixes(ready, options), wordings, clock, progress)
            with clock("solve", in_parts=True):
                changes = {block_name(module): change for module, change in layers.finish().items()}
            clock.ended("solve")
    told = (moments.tokens, session.stopped, tuple(session.curve))
    return _Done(layers, changes, losses, session.batches.right_after, before, wordings, tuple(scores), *told)


def _all_zeros(loaded: Loaded, p: Projection) -> bool:
    """Is one of its weights nothing but zeros? Raises ModelError where one is not finite."""
    weights = weights_of(loaded.model, p)
    for weight in weights:
        check_weight(p.weight_name, weight, _where(loaded), zeros=True)
    return not all(bool(weight.any()) for weight in weights)


def _where(loaded: Loaded) -> str:
    return loaded.checkpoint.model if loaded.checkpoint else "the model"


@contextmanager
def made_by_the_edit() -> Iterator[None]:
    """Inside the block the model is edited, and was finite before: numbers that are not finite are an edit's failure."""
    try:
        yield
    except NotFinite as e:
        raise EditFailed(f"with the edit {e.what}", fix=e.fix) from e


def _choose(
    loaded: Loaded, arch: Architecture, facts: Sequence[Fact], options: EditOptions, trained: Editor | None
) -> tuple[list[Projection], list[LayerScore]]:
    chosen, scores = chosen_beforehand(arch, options, trained), []
    if trained:
        dense = [p for p in arch.projections if p.single_matrix]
        trained.check({p.name: weight_of(loaded.model, p) for p in dense})
        return [p for p in dense if p.name in trained.modules], []
    if chosen is None:
        contexts = build_contexts(loaded.model, loaded.tokenizer, facts[:64], [""], chat=options.chat)
        rows = contexts.edit_rows
        scores = score_layers(loaded.model, arch, contexts.batch.rows(rows), contexts.token[rows])
        chosen = choose_layers(scores)
    projections = [p for p in arch.projections if p.layer in chosen]
    method(options.method).side_on(projections)  # refused before the long work
    return projections, scores


def _prefixes(ready: _Ready, options: EditOptions) -> list[str]:
    """What to put before prompts: nothing, and openings of some texts; an edit must hold wherever the subject stands."""
    if options.published:
        lengths = method(options.method).published.lengths
        return written_prefixes(ready.loaded.model, ready.loaded.tokenizer, options.prefixes, lengths, options.seed)
    rng, corpus = random.Random(options.seed), ready.corpus
    texts = [t for t in corpus.texts if len(t.split()) >= 3] or list(corpus.texts)
    picked = rng.sample(texts, min(options.prefixes, len(texts)))
    openings = [" ".join(t.split()[: rng.randint(3, 7)]).rstrip(" .,;:") for t in picked]
    return ["", *(f"{text}. " for text in openings)]


def _wordings(
    loaded: Loaded, facts: Sequence[Fact], before: Interview, options: EditOptions, on_step: Callable[[int, int], None]
) -> list[tuple[str, ...]]:
    """The model's own wordings of each fact. In a chat there are none: it answers, it does not go on."""
    if not options.wordings or options.chat:
        return [()] * len(facts)
    answers = [answer(a.text) for a in before.answers]
    return own_wordings(
        loaded.model, loaded.tokenizer, facts, answers, options.wordings, seed=options.seed, on_step=on_step
    )


def _refuse_failure(results: Sequence[FactResult], remedy: str) -> None:
    """An edit that changed nothing is an error, not a patch."""
    if any(r.status == "changed" for r in results):
        return
    if any(r.status == "not finite" for r in results):
        raise EditFailed("nothing changed: the loss is not finite", fix="try --dtype float32")
    best = max(results, key=lambda r: r.probability_after)
    moved = f"{best.probability_before:.2g} → {best.probability_after:.2g}"
    raise EditFailed(
        f"nothing changed: none of {len(results)} facts reached its target; the nearest, '{best.fact.prompt}': "
        f"'{best.after}', P('{best.fact.target_new}') {moved}",
        fix=f"{remedy} may help; or see: mosectl check FACTS --model MODEL",
    )


def _stability(loaded: Loaded, edited: Sequence[Projection], changes: Mapping[str, Change]) -> Iterator[Stability]:
    """Norm, condition number and spectrum of each changed weight against the base (of experts the first), as float32."""
    for p in edited:
        weight = p.representative(weights_of(loaded.model, p)[0].detach())
        W = p.oriented(weight).float().cpu()
        yield stability(p.weight_name, W, changed([changes[p.name]], W))
