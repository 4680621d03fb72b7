"""Is the text still text? Entropy of n-grams in continuations, and perplexity on a text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mosectl.facts.corpus import MAX_TOKENS
from mosectl.measure.bootstrap import Tally
from mosectl.model.forward import by_length, finite
from mosectl.model.positions import context_length
from mosectl.model.scoring import sequence_nll

WINDOW = 256  # tokens
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

    texts: tuple[Tally, ...]
    tokens: int
    window: int
    cut: bool  # the text was longer than MAX_TOKENS


def text_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = WINDOW,
    batch_tokens: int = 2048,
    max_tokens: int = MAX_TOKENS,
    on_step: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Each text in windows of ``window`` tokens side by side; a window's first token is context only, never predicted.

    A model with a shorter context gets windows of its length.

    Raises:
        NotFinite: a text's loss is not.
    """
    window = min(window, context_length(model))
    owner: list[int] = []
    windows: list[list[int]] = []
    used = total = 0
    for i, text in enumerate(texts):
        ids = list(tokenizer(text, verbose=False)["input_ids"])  # the length is ours to mind
        pieces = [ids[at : at + window] for at in range(0, len(ids) - 1, window)]  # a lone last token predicts nothing
        windows += pieces
        owner += [i] * len(pieces)
        used, total = i + 1, total + len(ids)
        if total >= max_tokens:
            break
    nll, counted = [0.0] * used, [0.0] * used
    chunks = by_length(windows, batch_tokens)
    for done, chunk in enumerate(chunks, 1):
        losses = sequence_nll(model, [windows[i] for i in chunk])
        finite(torch.tensor(losses), model)
        for i, loss in zip(chunk, losses, strict=True):
            nll[owner[i]] += loss
            counted[owner[i]] += len(windows[i]) - 1
        if on_step:
            on_step(done, len(chunks))
    tallies = tuple(Tally(a, b) for a, b in zip(nll, counted, strict=True))
    return TextLoss(tallies, int(sum(counted)), window, used < len(texts))
