"""What an edited layer must keep still, as two moments over a corpus: of what it reads and of what its output is worth.

C = E[k kᵀ], (p, p), of the FFN's inner activations k: what the layer writes has E[y yᵀ] = W C Wᵀ for any W, so one
statistic serves every solver and an edited layer needs no new one. G = E[g gᵀ], (d, d), of the gradients g of the loss
with respect to y: a shift y + δ of every token raises the divergence of the model's predictions by δᵀ G δ / 2. Both are the
factors of the Fisher information of W (K-FAC, Martens & Grosse 2015, arXiv 1503.05671); as there, the labels of the loss are
drawn from the model's own predictions.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.editing.enough_text import Halves, Work
from mosectl.editing.moments_cache import Entry, cached, check_writable, keep, remember_hash
from mosectl.facts.corpus import MAX_TOKENS, Corpus, read_corpus
from mosectl.model import distributed as processes
from mosectl.model.architecture import parse_layers, resolve
from mosectl.model.edit_site import Projection
from mosectl.model.forward import (
    Batch,
    attending,
    by_length,
    by_row,
    finite,
    frozen,
    input_device,
    logits_at,
    open_outputs,
    run_until_stopped,
    stop,
)
from mosectl.model.memory import fitting, halving
from mosectl.model.positions import window
from mosectl.model.weights import solve_device, turns, weight_of
from mosectl.storage.progress import Clock, OnStep

MAX_LENGTH = 512  # tokens a text: statistics do not need long contexts, and memory grows with them
BEGINNING = 100_000  # characters of a text that may hold the few tokens that are read of it
BATCH_TOKENS = 4096  # run at once; fewer where gradients would not fit in memory
BLOCK = 4096  # tokens of texts taken at random, in which those of like length then go together
# G is taken over a part of the first block: it is damped anyway, a gradient costs three forwards, and the logits of
# a large vocabulary cost more than all layers (docs/LOG.md).
PER_DIRECTION = 2  # tokens for each of G's d directions, and
LEAST = 1536  # tokens at least: a small model's cost little
ASKED = 1  # one in so many of these tokens has its logits asked; which ones is drawn anew in each text
# Relative errors of C at which no more text is read: never; low in the model; high in it, where less hangs on C (LOG.md).
ALL, LOW, HIGH = LEVELS = (0.0, 0.1, 0.3)


@dataclass(frozen=True)
class Moments:
    """Second moments of each edited layer's inner activations and of its output's gradients, by module path."""

    C: dict[str, Tensor]  # (p, p) float32
    G: dict[str, Tensor]  # (d, d) float32, nats²
    tokens: int
    cached: bool
    error: float  # of C, relative, as estimated (the layer that is worst)


def second_moments(
    model: nn.Module,
    tokenizer: Any,
    projections: Sequence[Projection],
    corpus: Corpus,
    *,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    cache: bool = True,
    strict: bool = False,  # raise OutputError where the cache cannot be written
    enough: float = LOW,
    folder: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Moments:
    """C = E[k kᵀ] and G = E[g gᵀ] for each projection over at most ``max_tokens`` tokens of ``corpus``.

    Texts come in random blocks, G's first, and no more are read once C is known well enough at every layer: the texts are
    dealt into two halves, and half the difference of the halves' C has the size of the error of the whole.
    Each layer is cached under the hash of the model's weights, so a changed model never meets old statistics. Under
    ``accelerate launch`` every process takes its share of the texts, all of them, and the sums are added up.

    Args:
        folder: the checkpoint's, so that a plan can tell later whether statistics are kept.
        enough: ‖C_A − C_B‖_F / 2‖C‖_F at which to stop, seen in some random directions; 0 = read everything. Statistics
            that are kept and better serve as well.
    Raises:
        NotFinite: the model's numbers are not.
    """
    weights = model_hash(model) if cache else ""
    key = cache_key(weights, corpus.sha256, max_tokens, enough) if cache else ""
    if folder is not None and weights and processes.first():
        remember_hash(folder, weights)
    if cache and (found := _kept(weights, corpus.sha256, projections, max_tokens, enough)):
        C, G = ({name: entry[part] for name, entry in found.items()} for part in "CG")
        error = max(float(entry["error"]) for entry in found.values())
        return Moments(C, G, int(next(iter(found.values()))["tokens"]), True, error)
    if cache and strict and processes.first():
        check_writable()
    blocks = _blocks(tokenizer, corpus, max_tokens, batch_tokens, min(MAX_LENGTH, window(model).most))
    C, G, tokens, error = _accumulate(model, projections, blocks, enough, on_step)
    for moment in (*C.values(), *G.values()):
        finite(moment, model)
    if cache and processes.first():
        told = {"tokens": torch.tensor(tokens), "error": torch.tensor(error)}
        keep(key, {name: {"C": C[name], "G": G[name], **told} for name in C}, strict)
    return Moments(C, G, tokens, False, error)


def moments_of(model: nn.Module, projections: Sequence[Projection], batch: Batch, seed: int) -> Moments:
    """C and G for each projection over every token of a batch of sequences, as the live model is now; nothing is cached."""
    sums, rng = _Sums(model, projections), torch.Generator(batch.input_ids.device).manual_seed(seed)
    size = max(1, BATCH_TOKENS // batch.input_ids.shape[1])
    with frozen(model):
        for number, rows in enumerate(torch.arange(len(batch.input_ids), device=batch.input_ids.device).split(size)):
            sums.add(batch.rows(rows), torch.ones(len(rows), dtype=torch.bool), rng, number)
    return Moments(*sums.moments(), int(sums.tokens[0]), False, sums.error())


def cache_key(weights: str, corpus: str, max_tokens: int = MAX_TOKENS, enough: float = LOW) -> str:
    """What statistics are kept under: hashes of weights and corpus, how much is read, and by which rules."""
    return f"{weights}-{corpus[:16]}-{max_tokens}-{enough:g}-{BLOCK}-{PER_DIRECTION}-{LEAST}-{ASKED}"


def serving(enough: float) -> list[float]:
    """The levels of error whose statistics serve where ``enough`` is asked, the best first."""
    return [*(level for level in LEVELS if level < enough), enough]


def _kept(
    weights: str, corpus: str, projections: Sequence[Projection], max_tokens: int, enough: float
) -> dict[str, Entry] | None:
    keys = (cache_key(weights, corpus, max_tokens, level) for level in serving(enough))
    return next((found for key in keys if (found := cached(key, projections))), None)


def prepare(
    model: str | Path,
    layers: str = "all",
    corpus: str | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_step: OnStep | None = None,
) -> Moments:
    """Load a model and fill the cache for some layers; under ``accelerate launch`` each process takes its own GPU.

    Args:
        on_step: called with (phase, done, total) as the work goes on.
    Raises:
        ModelError, HubError, UsageError.
    """
    from mosectl.model.loading import load

    texts, clock = read_corpus(corpus), Clock(on_step)

    def check(model: Any, _: Any) -> None:
        parse_layers(layers, len(resolve(model).projections), every="all")

    with clock("load"):
        loaded = load(model, revision=revision, device=processes.process_device(device), dtype=dtype, check=check)
    with turns(loaded.model, resolve(loaded.model)) as arch, clock("statistics") as step:
        chosen = parse_layers(layers, len(arch.projections), every="all")
        wanted = [p for p in arch.projections if chosen is None or p.layer in chosen]
        return second_moments(loaded.model, loaded.tokenizer, wanted, texts, strict=True, on_step=step)


def _accumulate(
    model: nn.Module,
    projections: Sequence[Projection],
    blocks: list[list[list[list[int]]]],
    enough: float,
    on_step: Callable[[int, int], None] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int, float]:
    """C and G by module path, the number of tokens of C, and C's error, over all processes."""
    distributed = processes.world() > 1
    mine = [(n, block, batch) for block, batches in enumerate(blocks) for n, batch in enumerate(batches)]
    if distributed:
        state = processes.join()
        mine = mine[state.process_index :: state.num_processes]
    sums, share = _Sums(model, projections), _gradient_share(projections, blocks[0])
    chosen, stops = _with_gradients(blocks[0], share), 0.0 if distributed else enough
    work = Work(mine, stops, share)
    if on_step:
        on_step(*work.so_far(0))
    with frozen(model):
        for done, (number, block, sequences) in enumerate(mine, 1):
            batch = Batch.of(sequences, input_device(model))
            taken = torch.tensor(chosen[number] if block == 0 else [False] * len(sequences))
            sums.add(batch, taken, torch.Generator(batch.input_ids.device).manual_seed(number), done)
            full = done == len(mine) or mine[done][1] > block
            if stops and (full or done & (done - 1) == 0):  # now and then in the first block: it is not free
                work.foresee(done, sums.error())
            if on_step:
                on_step(*work.so_far(done))
            if work.end == done:
                break
    error = sums.error() / math.sqrt(processes.world())  # each process knows of its own texts only
    return (*sums.moments(), int(sums.tokens[0]), error)


def gradient_tokens(d: int) -> int:
    """How many tokens G (d, d) is taken over, where there are as many."""
    return max(PER_DIRECTION * d, LEAST)


def _gradient_share(projections: Sequence[Projection], first: list[list[list[int]]]) -> float:
    """The share of the first block's texts that G is taken over."""
    tokens = sum(len(ids) for batch in first for ids in batch)
    return min(1.0, gradient_tokens(max(p.d for p in projections)) / max(1, tokens))


def _with_gradients(first: list[list[list[int]]], share: float) -> list[list[bool]]:
    """Which texts of each batch of the first block G is taken over: that share of them at random, one at least."""
    chosen = []
    for number, sequences in enumerate(first):
        rng = random.Random(number)
        chosen.append([rng.random() < share for _ in sequences])
    if chosen and not any(map(any, chosen)):
        chosen[-1][-1] = True  # the longest
    return chosen


class _Sums:
    """Sums of k kᵀ and g gᵀ by module path, float32: a batch is a block of thousands of tokens, so few are added up."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        self.model, self.projections = model, projections
        self.sums: dict[tuple[str, str], Tensor] = {}
        for p in projections:
            place = torch.empty(0, device=solve_device(weight_of(model, p).device))
            self.sums |= {(p.name, "C"): place.new_zeros(p.p, p.p), (p.name, "G"): place.new_zeros(p.d, p.d)}
        self.halves = {p.name: Halves(self.sums[p.name, "C"]) for p in projections}
        # Of C those that were read, of G those whose logits were asked.
        self.tokens = torch.zeros(2, dtype=torch.long, device=input_device(model))

    def add(self, batch: Batch, taken: Tensor, rng: torch.Generator, number: int) -> None:
        """A batch's texts, with gradients of those that are ``taken`` (B,) bool."""
        for rows in (taken.nonzero().flatten(), (~taken).nonzero().flatten()):
            if not len(rows):
                continue
            part = batch.rows(rows.to(batch.input_ids.device))
            if taken[rows[0]]:
                keys, gradients, asked = _in_parts(self.model, self.projections, part, rng)
                self._square(gradients, "G")
                self.tokens[1] += asked
            else:
                keys = keys_of_tokens(self.model, self.projections, part)
            self._square(keys, "C")
            mask = part.attention_mask.bool()
            self.tokens[0] += mask.sum()
            text = rows.to(mask.device)[:, None].expand_as(mask)[mask]
            for name, k in keys.items():
                self.halves[name].add(k, (text + number) % 2 == 1)

    def _square(self, found: dict[str, Tensor], kind: str) -> None:
        for name, x in found.items():
            total = self.sums[name, kind]
            total.addmm_(x.T.to(total), x.to(total))

    def error(self) -> float:
        return max(h.error() for h in self.halves.values())

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """C and G over all processes: means over tokens; a token's g is that of all asked positions behind it."""
        if processes.world() > 1:
            from accelerate.utils import reduce

            self.sums = {name: reduce(total, "sum") for name, total in self.sums.items()}
            self.tokens = reduce(self.tokens, "sum")
        n = dict(zip("CG", self.tokens.clamp_min(1).tolist(), strict=True))
        C, G = ({p.name: (self.sums[p.name, key] / n[key]).cpu() for p in self.projections} for key in "CG")
        return C, G


def keys_of_tokens(model: nn.Module, projections: Sequence[Projection], batch: Batch) -> dict[str, Tensor]:
    """k (tokens, p) float32 of every token of a batch by module path."""
    keys: dict[str, Tensor] = {}
    last = max(projections, key=lambda p: p.layer)

    def record(p: Projection) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            keys[p.name] = _tokens(args[0], batch)
            if p is last:
                raise stop

        return hook

    run_until_stopped(model, batch, [(p.name, record(p)) for p in projections])
    return keys


def _tokens(x: Tensor, batch: Batch) -> Tensor:
    """(tokens, n) float32 of what a layer reads or writes: what is padding is left out."""
    mask = batch.attention_mask.bool()
    return by_row(x.detach(), len(mask))[mask.to(x.device)].float()


def _in_parts(
    model: nn.Module, projections: Sequence[Projection], batch: Batch, rng: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """As _keys_and_gradients, on as many sequences at once as fit in memory."""
    n, tokens = batch.input_ids.shape
    size = fitting(model, resolve(model), min(p.layer for p in projections), tokens, max(1, tokens / ASKED))

    def work(start: int, end: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        return _keys_and_gradients(model, projections, batch.rows(torch.arange(start, end)), rng)

    parts = [part for _, part in halving(n, size, work)]
    keys = {p.name: torch.cat([part[0][p.name] for part in parts]) for p in projections}
    gradients = {p.name: torch.cat([part[1][p.name] for part in parts]) for p in projections}
    return keys, gradients, sum(part[2] for part in parts)


def _keys_and_gradients(
    model: nn.Module, projections: Sequence[Projection], batch: Batch, rng: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """k (tokens, p) and g (tokens, d), float32, of every token of a batch by module path, and how many positions are asked.

    g is the gradient, by the token's output, of the summed loss of a label drawn at each asked position. The labels of two
    positions are independent, so that E[g gᵀ] is a sum over positions, and asking one in ASKED gives that part of it.
    """
    mask = batch.attention_mask.bool()
    asked = mask & (torch.rand(mask.shape, device=mask.device, generator=rng) < 1 / ASKED)
    if not bool(asked.any()):
        asked[0, int(mask[0].sum()) - 1] = True
    every = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    opened = open_outputs(model, projections, lambda k: _tokens(k, batch))
    with opened as (keys, leaves), logits_at(model, every, asked), torch.enable_grad(), attending(model, mask.shape[1]):
        logits = finite(model(**batch.kwargs()).logits[0], model)
        logp = logits.float().log_softmax(-1)  # (asked, V)
        labels = torch.multinomial(logp.detach().exp().to(rng.device), 1, generator=rng)
        loss = -logp.gather(1, labels.to(logp.device)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {name: _tokens(g, batch) for name, g in zip(leaves, found, strict=True)}
    return keys, gradients, int(asked.sum())


def _blocks(
    tokenizer: Any, corpus: Corpus, max_tokens: int, batch_tokens: int, longest: int = MAX_LENGTH
) -> list[list[list[list[int]]]]:
    """Texts taken at random as token sequences of at most ``longest``; in blocks of about BLOCK tokens, each a sample of
    the corpus, which are split into batches of like length.
    """
    blocks: list[dict[int, list[int]]] = [{}]
    total = begun = 0
    for i in random.Random(0).sample(range(len(corpus.texts)), len(corpus.texts)):
        ids = tokenizer(corpus.texts[i][:BEGINNING], truncation=True, max_length=longest)["input_ids"]
        if not ids:
            continue
        if total - begun >= BLOCK:
            blocks.append({})
            begun = total
        blocks[-1][i] = ids
        total += len(ids)
        if total >= max_tokens:
            break
    ordered = [[block[i] for i in sorted(block)] for block in blocks]
    return [[[block[i] for i in batch] for batch in by_length(block, batch_tokens)] for block in ordered]


def model_hash(model: nn.Module) -> str:
    """sha256 over every parameter's name, dtype, shape and bytes (first 32 hex digits)."""

    def digest(item: tuple[str, nn.Parameter]) -> str:
        name, p = item
        raw = p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{name} {p.dtype} {tuple(p.shape)} {hashlib.sha256(raw.data).hexdigest()}"

    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
        lines = sorted(pool.map(digest, model.named_parameters()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
