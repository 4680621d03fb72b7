"""Text a model writes by itself: the nearest thing to what it was trained on that everyone has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mosectl.errors import ModelError
from mosectl.facts.words import within_word
from mosectl.model.forward import finite, input_device
from mosectl.model.positions import check_prompt, prompt_ids, window

BATCH = 128  # samples written at once


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    tokens: int,
    *,
    sampled: bool = False,
    likeliest: int = 0,
) -> list[str]:
    """What follows each token sequence, at most ``tokens`` tokens: greedily, or from the model's own distribution, of which
    ``likeliest`` takes only so many tokens (0: all).

    All are run at once, padded on the left; special tokens are left out. Samples are of temperature 1 and depend on
    torch's random state. Where a model's positions end first, so does the text; a sequence itself must fit.

    Raises:
        NotFinite: the model's logits are not. ModelError: its generation_config.json makes no sense.
    """
    seen = window(model)
    if max(map(len, sequences)) + tokens - 1 <= seen.most:
        return _continued(model, tokenizer, sequences, tokens, sampled, seen.rows, likeliest)
    # Those that have the room together, so that nobody's neighbour cuts them short; the others one by one.
    roomy = [s for s in sequences if len(s) + tokens - 1 <= seen.limit]
    long = iter(_continued(model, tokenizer, roomy, tokens, sampled, seen.rows, likeliest) if roomy else ())
    return [
        next(long)
        if len(s) + tokens - 1 <= seen.limit
        else _continued(model, tokenizer, [s], seen.limit - len(s) + 1, sampled, seen.rows, likeliest)[0]
        for s in sequences
    ]


def _continued(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    tokens: int,
    sampled: bool,
    rows: int,
    likeliest: int,
) -> list[str]:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(t for t in pads if t is not None and t < rows)  # some tokenizers have more tokens than the model
    width, device = max(map(len, sequences)), input_device(model)
    try:
        longer = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=device),
            attention_mask=torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device),
            max_new_tokens=tokens,
            num_beams=1,
            pad_token_id=pad,
            do_sample=sampled,
            logits_processor=[lambda _, scores: finite(scores, model)],  # at every token: NaN would pass for an answer
            **(
                {"temperature": 1.0, "top_p": 1.0, "top_k": likeliest}
                if sampled
                else dict.fromkeys(("temperature", "top_p", "top_k"))
            ),
        )
    except (ValueError, TypeError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        fix = "check its generation_config.json, or remove that file"
        raise ModelError(f"the model cannot generate: {first}", fix=fix) from e
    # Decoding what was there and what follows together keeps the space between them right for every tokenizer.
    texts = tokenizer.batch_decode(
        [[*s, *row[width:]] for s, row in zip(sequences, longer.tolist(), strict=True)], skip_special_tokens=True
    )
    known = tokenizer.batch_decode([list(s) for s in sequences], skip_special_tokens=True)
    return [text[len(before) :] for text, before in zip(texts, known, strict=True)]


def own_text(
    model: Any,
    tokenizer: Any,
    samples: int,
    *,
    tokens: int = 64,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Sample from the model's own distribution (temperature 1), each text from the token that begins a text, on one line.

    The same seed gives the same text on the same machine. Empty samples are left out.

    Raises:
        ModelError: the tokenizer has no token to begin with, or every sample is empty.
    """
    begin = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if begin is None:
        raise ModelError("its tokenizer has no token that begins or ends a text", fix="give a --corpus of your own")
    texts: list[str] = []
    with seeded(model, seed):
        while len(texts) < samples:
            starts = [[begin]] * min(BATCH, samples - len(texts))
            texts += continuations(model, tokenizer, starts, tokens, sampled=True)
            if on_step:
                on_step(len(texts), samples)
    lines = [line for text in texts if (line := " ".join(text.split()))]
    if not lines:
        raise ModelError("it writes nothing by itself", fix="give a --corpus of your own")
    return lines


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; torch's own state is as before afterwards."""
    device = input_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


MAX_NEW_TOKENS = 50
_END = re.compile(r"\n|\.(?=\s|$|[A-Z][a-z])")  # "U.S." and "3.5" go on


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    chat: bool = False,
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy continuations, one a prompt, batched with left padding; special tokens are left out.

    Raises:
        UsageError: a prompt is longer than the model can read. NotFinite: its logits are not.
    """
    out: list[str] = []
    seen = window(model)
    ids = [prompt_ids(tokenizer, p, chat) for p in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        check_prompt(seen, prompt, tokens)
    for start in range(0, len(prompts), batch_size):
        part = ids[start : start + batch_size]
        out += continuations(model, tokenizer, part, min(max_new_tokens, MAX_NEW_TOKENS))
        if on_step:
            on_step(len(out), len(prompts))
    return out


def answer(text: str) -> str:
    """A continuation cut at the first full stop, newline or end."""
    return _END.split(text.strip(), maxsplit=1)[0].strip()


def ends(text: str) -> bool:
    """Does a sentence end in the text?"""
    return bool(_END.search(text))


def says(text: str, expected: str) -> bool:
    """Does a greedy continuation start with ``expected``, and end its last word there (case counts)?"""
    text, expected = text.strip(), expected.strip()
    following = text[len(expected) : len(expected) + 1]
    return text.startswith(expected) and not within_word(expected[-1:], following)
