"""Is the text still text? Entropy of n-grams in continuations, and perplexity on a text."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mosectl.facts.corpus import MAX_TOKENS
from mosectl.measure.bootstrap import SEED, Tally, half_width
from mosectl.model.forward import by_length, finite
from mosectl.model.positions import context_length
from mosectl.model.scoring import sequence_nll

WINDOW = 256  # tokens
BOUND = 0.15  # nats a token; what an edit changes on the same texts is known far better
LEAST = 32  # texts: the spread of fewer is not known well enough to stop by it
_WORD = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 · H₂ and 4/3 · H₃, Hₙ the entropy of the text's n-grams of words in bits: low when it repeats itself.

    ROME's "generation entropy" (arXiv 2202.05262), `compute_n_gram_entropy` with its weights. Words here are runs of
    letters and digits, or single other signs; there they are nltk's, and the prompt is part of the text.
    """
    words = _WORD.findall(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return sum(c / total * math.log2(total / c) for c in counts.values())


@dataclass(frozen=True)
class TextLoss:
    """NLL of each text in nats, out of its predicted tokens; exp(Σ NLL / Σ tokens) is the perplexity."""

    texts: tuple[Tally, ...]  # those that were read, in the order of the file
    tokens: int
    window: int
    cut: bool  # there were more than MAX_TOKENS to read
    which: tuple[int, ...]  # the numbers of the texts that were read
    of: int  # texts there are


def text_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = WINDOW,
    batch_tokens: int = 2048,
    max_tokens: int = MAX_TOKENS,
    bound: float | None = BOUND,
    like: TextLoss | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Each text in windows of ``window`` tokens side by side; a window's first token is context only, never predicted.

    A model with a shorter context gets windows of its length. Texts are read in an order drawn by chance, always the same,
    so that those read by then are a sample of all.

    Args:
        bound: enough is read once half the 95 % interval of the mean loss is no wider, nats a token; None: read all.
        like: read the texts that this one has, so that the two can be compared.
    Raises:
        NotFinite: a text's loss is not.
    """
    window = min(window, context_length(model))
    order = list(range(len(texts))) if like is None else list(like.which)
    if like is None and bound is not None:
        random.Random(SEED).shuffle(order)
    most = max_tokens if like is None else math.inf
    found: dict[int, Tally] = {}
    seen = 0
    while len(found) < len(order) and seen < most:
        part: dict[int, list[int]] = {}
        while len(found) + len(part) < len(order) and sum(map(len, part.values())) < min(batch_tokens, most - seen):
            i = order[len(found) + len(part)]
            part[i] = list(tokenizer(texts[i], verbose=False)["input_ids"])  # the length is ours to mind
        found |= _losses(model, part, window, batch_tokens)
        seen += sum(map(len, part.values()))
        enough = like is None and bound is not None and len(found) >= LEAST and half_width([*found.values()]) <= bound
        if on_step:
            on_step(len(found), len(found) if enough or seen >= most else len(order))
        if enough:
            break
    cut = like.cut if like else seen >= most and len(found) < len(texts)
    tallies = tuple(found[i] for i in sorted(found))
    return TextLoss(tallies, int(sum(t.weight for t in tallies)), window, cut, tuple(sorted(found)), len(texts))


def read_note(loss: TextLoss, bound: float | None) -> str:
    """What a reader must know about how much was read; empty where that is everything."""
    if len(loss.which) == loss.of:
        return ""
    if bound is None:
        return f"perplexity is on the first {loss.tokens:,} tokens of the text"
    of = f"{len(loss.which):,} of {loss.of:,} texts, drawn by chance, the same on both sides ({loss.tokens:,} tokens)"
    return f"perplexity is on {of}" + (
        "" if loss.cut else f": enough to know the mean loss within ±{bound:g} nats a token"
    )


def _losses(model: nn.Module, texts: Mapping[int, Sequence[int]], window: int, batch_tokens: int) -> dict[int, Tally]:
    """The loss of each text, tokens by number."""
    # A lone last token predicts nothing.
    pieces = [(i, ids[at : at + window]) for i, ids in texts.items() for at in range(0, len(ids) - 1, window)]
    nll, counted = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0.0)
    for chunk in by_length([piece for _, piece in pieces], batch_tokens):
        losses = sequence_nll(model, [pieces[k][1] for k in chunk])
        finite(torch.tensor(losses), model)
        for k, loss in zip(chunk, losses, strict=True):
            i, piece = pieces[k]
            nll[i] += loss
            counted[i] += len(piece) - 1
    return {i: Tally(nll[i], counted[i]) for i in texts}
