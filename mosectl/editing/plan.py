"""What an edit would take, before any weight is loaded: time, memory, the patch's size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mosectl.editing.guard import CANARIES, CANARY_TOKENS
from mosectl.editing.layers import LAST, enough, likely_layers, settled, top_layers
from mosectl.editing.low_rank import PROBES
from mosectl.editing.methods import method
from mosectl.editing.methods.base import seeks_compact
from mosectl.editing.moments_cache import known_hash, path_of
from mosectl.editing.options import EditOptions, trained_editor
from mosectl.editing.pace import Pace, pace
from mosectl.editing.paraphrases import ROUND, TOKENS
from mosectl.editing.replies import replies_wanted
from mosectl.editing.second_moments import ALL, BATCH_TOKENS, BLOCK, HIGH, LOW, cache_key, gradient_tokens, serving
from mosectl.errors import MosectlError
from mosectl.facts.corpus import MAX_TOKENS, read_corpus
from mosectl.facts.records import Fact
from mosectl.linalg.metric import EXACT
from mosectl.measure.next_tokens import TEXTS, WORDS
from mosectl.model.architecture import Architecture, parse_layers, resolve, skeleton
from mosectl.model.edit_site import Projection
from mosectl.model.files import has_chat_template
from mosectl.model.loading import pick_device, pick_dtype
from mosectl.model.memory import logit_bytes, token_bytes, work_bytes
from mosectl.patch.change import SIDES
from mosectl.storage.checkpoint import locate, read_config

_STEPS = (
    6  # optimiser steps a fact takes over all rounds, of all its rows, as seen in practice; each round adds a forward
)
_PER_KEY = 16  # tokens for each of C's p directions, until it is known well enough low in the model
_TURNED = 10  # rank of a compact rotation of one fact, sought from the start: seen on SmolLM2-135M (docs/LOG.md)
_SMALL = 0.3  # seconds of a solve's small problems up to rank 40


@dataclass(frozen=True)
class Estimate:
    """What an edit will take; seconds are rough (a matrix product is timed on this device), bytes are not."""

    model: str
    model_type: str
    parameters: int
    device: str
    dtype: str
    layers: tuple[int, ...]  # "auto": likely ones
    auto: bool
    model_bytes: int
    peak_bytes: int
    patch_bytes: int
    patch_most: int  # the same, if no layer's rotation can be cut down
    seconds: dict[str, float]  # by phase


def estimate(
    model: str | Path,
    facts: Sequence[Fact],
    options: EditOptions,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    host: bool | None = None,
) -> Estimate:
    """Time, memory and patch size of an edit, from config.json and the facts alone.

    Args:
        host: memory of a CPU's process, or (False) of a GPU; None: of the device.
    Raises:
        ModelError, HubError, UsageError.
    """
    folder, name, _ = locate(model, revision, weights=False)
    config = read_config(folder)
    meta_model = skeleton(config)
    arch = resolve(meta_model, name)
    device = pick_device(device)
    kind = pick_dtype(dtype, device, config)
    options = settled(options, len(arch.projections), len(facts))
    options = replace(options, replies=replies_wanted(options, has_chat_template(folder)))
    layers, size, most = _planned(meta_model, arch, facts, options)
    host = device == "cpu" if host is None else host
    work = _Work(meta_model, arch, layers, facts, options, device, kind, host, _known(folder, arch, layers, options))
    solver = method(options.method)
    return Estimate(
        model=name,
        model_type=arch.model_type,
        parameters=work.parameters,
        device=device,
        dtype=str(kind).removeprefix("torch."),
        layers=layers,
        auto=options.layers == "auto" and not (solver.editor or options.published or options.fact_token == LAST),
        model_bytes=work.weights,
        peak_bytes=work.weights + solver.peak_bytes(work),
        patch_bytes=size,
        patch_most=most,
        seconds=solver.seconds(work),
    )


def _known(folder: Path, arch: Architecture, layers: Sequence[int], options: EditOptions) -> bool:
    """Are the statistics of these layers kept from an earlier edit?"""
    weights = known_hash(folder)
    if not weights:
        return False
    corpus, edited = read_corpus(options.corpus).sha256, [p for p in arch.projections if p.layer in layers]
    keys = [cache_key(weights, corpus, enough=level) for level in serving(enough(options))]
    return any(all(path_of(key, p.name).exists() for p in edited) for key in keys)


def patch_bytes(model: str | Path, facts: Sequence[Fact], options: EditOptions, *, revision: str | None = None) -> int:
    """Bytes of an edit's patch, as far as one can tell before it; 0 where the edit itself will say what is wrong."""
    with suppress(MosectlError, ArithmeticError, ValueError, TypeError):  # an odd config.json: told by the edit
        meta_model = skeleton(read_config(locate(model, revision, weights=False)[0]))
        arch = resolve(meta_model)
        return _planned(meta_model, arch, facts, settled(options, len(arch.projections), len(facts)))[1]
    return 0


def _planned(
    meta_model: Any, arch: Architecture, facts: Sequence[Fact], options: EditOptions
) -> tuple[tuple[int, ...], int, int]:
    """The layers that will be edited ("auto": likely ones), the patch's bytes, and these at most."""
    solver, n = method(options.method), len(arch.projections)
    likely = top_layers(n) if options.fact_token == LAST else likely_layers(n)
    usual = solver.published.edited(arch.model_type, n) if options.published else likely
    layers = tuple(parse_layers(options.layers, n) or usual)
    if editor := trained_editor(options):
        editor.check({p.name: meta_model.get_parameter(p.weight_name) for p in arch.projections if p.single_matrix})
        layers = tuple(p.layer for p in arch.projections if p.name in editor.modules)
    edited = [p for p in arch.projections if p.layer in layers]
    side, form, written = solver.side_on(edited), solver.form(options.form), solver.columns(facts)
    if seeks_compact(solver, options.form, max(p.d for p in edited)):
        rank = sum(_rank(n, options) for n in _batches(len(facts), options))  # those of all batches multiply
        size = sum(4 * min(rank * (n + rank), n * n) for p in edited for n in (p.d, p.p))
        return layers, size, size
    largest = "dense" if form == "auto" else form
    size, most = (sum(_patch_bytes(p, side, form, written) for p in edited) for form in (form, largest))
    return layers, size, most


def _batches(facts: int, options: EditOptions) -> list[int]:
    """Facts of each batch."""
    size = options.batch_size or max(1, facts)
    return [min(size, facts - start) for start in range(0, facts, size)]


def _rank(facts: int, options: EditOptions) -> int:
    """Of the compact rotations of one batch, where they are sought from the start."""
    return int(options.solver.get("rank", 0)) or round(_TURNED * facts**GROWTH)


TOGETHER = 32  # rows written at once on a CPU
RANK = {
    "both": 20,
    "output": 5,
    "input": 20,
}  # of a compact rotation of one fact, cut down from a dense one: seen on the demo model (docs/LOG.md)
GROWTH = 0.6  # its power of the number of facts, in one batch or in several


def _patch_bytes(p: Projection, side: str, form: str, written: int) -> int:
    """Bytes of one layer's factors in a patch that writes ``written`` outputs; a compact form's rank is an estimate."""
    if side == "additive":
        return 4 * min(written, p.d) * (p.d + p.p)
    total = 0
    for name in SIDES[side]:
        n = {"R": p.d, "R_in": p.p}[name]
        rank = min(round(RANK[side] * written**GROWTH), n)
        total += 4 * (n * n if form == "dense" else min(rank * (n + rank), n * n))
    return total


class _Work:
    """Counts of tokens and operations of one edit."""

    def __init__(
        self, meta_model: Any, arch: Architecture, layers: Sequence[int], facts: Sequence[Fact], options: EditOptions,
        device: str, kind: torch.dtype, host: bool, known: bool,
    ) -> None:  # fmt: skip
        self.options, self.layers, self.arch = options, layers, arch
        self.device, self.kind, self.host = device, kind, host
        self.parameters = sum(p.numel() for p in meta_model.parameters())
        self.weights = self.parameters * kind.itemsize  # bytes
        self.projection = arch.projections[0]
        self.vocabulary = meta_model.get_output_embeddings().weight.shape[0]
        n = len(arch.projections)
        self.depth, self.known = n, known
        self.per_layer = sum(p.numel() for p in meta_model.get_submodule(arch.layers_path).parameters()) / n
        self.model = meta_model
        self.facts = len(facts)
        # English text in common vocabularies: about 1.4 tokens a word.
        self.prompt = 2 + 1.4 * sum(len(f.prompt.split()) for f in facts) / max(1, len(facts))
        self.asked = sum(1 + len(f.rephrase_prompts) + len(f.locality) for f in facts)
        self.rows = 2 + options.prefixes + bool(options.replies) + (0 if options.chat else options.wordings)  # at most
        self.row_tokens = self.prompt + 8 + 3
        self.tail_tokens = 4 if options.fact_token == LAST else self.row_tokens / 2  # from the edited token on

    def one_pass_bytes(self) -> int:
        """Of one forward and backward pass: sums of all edited layers, W before and after, one layer's solve."""
        d, p, n = self.projection.d, self.projection.p, len(self.layers)
        return int(8 * n * (p * p + 3 * d * p) + max(self._pass_bytes(), 8 * (p * p + 2 * d * p)))

    def training_bytes(self) -> int:
        """Of descent on the edited weights: W before, so far and next, two gradients and Adam's moments twice."""
        return int(8 * len(self.layers) * 6 * self.projection.d * self.projection.p + self._pass_bytes())

    def _pass_bytes(self) -> float:
        """Of a forward and backward pass through all facts, or as many as fit."""
        asked = self.facts * (self.row_tokens * self._token_bytes() + 3 * logit_bytes(self.vocabulary))
        return min(work_bytes(self.weights), asked)

    def _token_bytes(self) -> int:
        d, p = self.projection.d, self.projection.p
        return token_bytes(d, p, self.kind.itemsize) * (len(self.arch.projections) - min(self.layers))

    def search_bytes(self) -> int:
        """Beyond the weights, in the phase that takes most: sums and a backward pass for statistics, a backward pass for
        targets, or one layer's solve in float64. On a CPU what waits on the host counts as well.
        """
        d, p, n = self.projection.d, self.projection.p, len(self.layers)
        work, one, host, itemsize = work_bytes(self.weights), self._token_bytes(), self.host, self.kind.itemsize
        rows = min(self.options.targets.max_rows, self.rows * (self.options.batch_size or self.facts))
        gradients = BATCH_TOKENS * (one + logit_bytes(self.vocabulary))
        steps = rows * (self.tail_tokens * one + 3 * logit_bytes(self.vocabulary))
        held = n * 8 * d * p + host * n * (4 * p * p + 8 * d * p + itemsize * d * p)
        phases = (
            n * 4 * (p * p + d * d) + 4 * BATCH_TOKENS * (p + d) * n + min(work, gradients),
            held + min(work, steps),
            self._compact_bytes()
            if self._compact()
            else held + 8 * max((2 + host) * p * p + 3 * d * p, (1 + host) * p * p + 10 * d * p),
        )
        return int(max(phases))

    def _compact(self) -> bool:
        """Compact rotations are sought from the start."""
        return seeks_compact(method(self.options.method), self.options.form, self.projection.d)

    def _compact_bytes(self) -> int:
        """Of a solve by compact rotations: each layer's factor and weights, one layer's C and products with W."""
        d, p, n = self.projection.d, self.projection.p, len(self.layers)
        layer = p * p * (8 if p <= EXACT else 4) + 16 * d * p
        return n * layer + self.host * n * (8 + self.kind.itemsize) * d * p + 4 * p * p + 24 * d * p

    def _asking(self, pace: Pace) -> float:
        """Of one side: reading the prompts, writing the answers, what comes next in ordinary text."""
        texts = self.facts * 4 + TEXTS
        reading = (self.asked * self.prompt + texts * 1.4 * WORDS) * self.depth * pace.forward
        return reading + texts * pace.head + self._writing(pace, self.asked + 4 * self.facts, 6)

    def _writing(self, pace: Pace, rows: float, tokens: float) -> float:
        """A step reads the weights: it takes the same for any number of rows up to TOGETHER."""
        return tokens * (rows * pace.head + -(-rows // TOGETHER) * self.depth * pace.step)

    @cached_property
    def pace(self) -> Pace:
        """Measured only where seconds are asked for."""
        return pace(self.model, "cuda" if self.device == "balanced" else self.device, self.kind)

    def one_pass_seconds(self) -> dict[str, float]:
        """Of one forward and backward pass a fact, sums of keys' squares, one solve."""
        speed, (d, p) = self.pace, (self.projection.d, self.projection.p)
        sums = self.facts * 3 * 2 * (p * p + d * p) + 2 * p**3 / 3 + 2 * d * p * p
        return self._passes(1, len(self.layers) * sums * speed.exact)

    def training_seconds(self) -> dict[str, float]:
        """Of a forward and backward pass a fact and epoch."""
        return self._passes({**method(self.options.method).defaults, **self.options.solver}["epochs"], 0.0)

    def _passes(self, passes: float, more: float) -> dict[str, float]:
        speed = self.pace
        one = self.facts * (self.row_tokens * self.depth * speed.backward + 2 * speed.head_backward)
        return {
            "load": 0.5 + self.weights / 1e9,
            "ask before and after": 2 * self._asking(speed),
            "solve": passes * one + more,
        }

    def search_seconds(self) -> dict[str, float]:
        """By phase, where values are searched for."""
        speed, o, (d, p) = self.pace, self.options, (self.projection.d, self.projection.p)
        below, above = max(self.layers) + 1, self.depth - min(self.layers)
        batches = -(-self.facts // (o.batch_size or max(1, self.facts)))
        corpus = min(MAX_TOKENS, sum(len(t) for t in read_corpus(o.corpus).texts) / 4)
        read = {ALL: corpus, LOW: _PER_KEY * p, HIGH: BLOCK}[enough(o)]
        corpus = min(corpus, max(BLOCK, read))
        asked = min(corpus, gradient_tokens(d))
        product = speed.forward / self.per_layer  # of one operation in the model's type, two of them a weight
        statistics = corpus * (below * speed.forward + len(self.layers) * p * p * product) + asked * (
            above * speed.backward + speed.head_backward
        )
        steps = (_STEPS + o.rounds) * self.facts * self.rows
        health = (batches + 1) * CANARIES * CANARY_TOKENS / 2 * (self.depth * speed.forward + speed.head)
        return {
            "load": 0.5 + self.weights / 1e9,
            "statistics": 0.0 if self.known else statistics,
            "ask before and after": 2 * self._asking(speed),
            "wordings": 0.0 if o.chat or not o.wordings else self._writing(speed, ROUND * self.facts, TOKENS),
            "targets": steps * (self.tail_tokens * above * speed.backward + 1.5 * speed.head_backward),
            "solve": batches * o.rounds * len(self.layers) * self._solve(speed),
            "guard": health,
        }

    def _solve(self, speed: Pace) -> float:
        """One layer's, once."""
        d, p = self.projection.d, self.projection.p
        if not self._compact():
            return (p**3 + 10 * (20 * d**3 + 8 * d * d * p + 2 * d * p * p)) * speed.exact
        n = min(self.options.batch_size or self.facts, self.facts)
        rank = min(_rank(n, self.options), d / 2)
        columns = 4 * (PROBES + rank) + 3 * self.rows * n  # products with the metric and W over all stages
        return columns * (2 * p * p + 6 * d * p) * speed.exact + _SMALL * (1 + (rank / 40) ** 2)
