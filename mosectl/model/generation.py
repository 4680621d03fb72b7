"""Text a model writes by itself: the nearest thing to what it was trained on that everyone has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mosectl.errors import ModelError
from mosectl.facts.words import within_word
from mosectl.model.forward import finite, input_device
from mosectl.model.positions import window
from mosectl.text.normalised import normalised

BATCH = 128  # samples written at once


Told = Callable[[int, Sequence[int]], bool]  # the number of a sequence, what follows it so far: is it enough?


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
    new = following(model, tokenizer, sequences, tokens, sampled=sampled, likeliest=likeliest)
    return decoded(tokenizer, sequences, new)


@torch.no_grad()
def following(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    tokens: int,
    *,
    sampled: bool = False,
    likeliest: int = 0,
    told: Told | None = None,
) -> list[list[int]]:
    """The tokens of :func:`continuations`, padding after an end among them.

    Args:
        told: nothing more is written once it is true of every sequence; true once, it must stay so.
    """
    seen = window(model)
    how = _sampling(likeliest) if sampled else _GREEDY
    if max(map(len, sequences)) + tokens - 1 <= seen.most:
        return _extended(model, tokenizer, sequences, tokens, how, seen.rows, told)
    # Those that have the room together, so that nobody's neighbour cuts them short; the others one by one.
    out: list[list[int]] = [[]] * len(sequences)
    roomy = [i for i, s in enumerate(sequences) if len(s) + tokens - 1 <= seen.limit]
    for part in [roomy, *([i] for i, s in enumerate(sequences) if len(s) + tokens - 1 > seen.limit)]:
        if part:
            most = min(tokens, seen.limit + 1 - max(len(sequences[i]) for i in part))
            theirs = None if told is None else lambda row, new, part=part: told(part[row], new)
            new = _extended(model, tokenizer, [sequences[i] for i in part], most, how, seen.rows, theirs)
            for i, row in zip(part, new, strict=True):
                out[i] = row
    return out


_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _sampling(likeliest: int) -> dict[str, Any]:
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": likeliest}


def _extended(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    tokens: int,
    how: Mapping[str, Any],
    rows: int,
    told: Told | None,
) -> list[list[int]]:
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
            logits_processor=[lambda _, scores: finite(scores, model)],  # at every token: NaN would pass for an answer
            stopping_criteria=[_all_told(told, len(sequences), width, model.generation_config)] if told else None,
            **how,
        )
    except (ValueError, TypeError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        fix = "check its generation_config.json, or remove that file"
        raise ModelError(f"the model cannot generate: {first}", fix=fix) from e
    return [row[width:] for row in longer.tolist()]


def _all_told(told: Told, rows: int, width: int, config: Any) -> Callable[..., Tensor]:
    """A stopping criterion for transformers: every row is told enough, or has ended by itself."""
    stops = {*(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])}
    waiting = list(range(rows))

    def criterion(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        while waiting:  # one row that is not told is reason enough to go on: the others need no look
            new = input_ids[waiting[-1], width:].tolist()
            if stops.isdisjoint(new) and not told(waiting[-1], new):
                break
            waiting.pop()
        return torch.full((rows,), not waiting, device=input_ids.device)

    return criterion


def decoded(tokenizer: Any, sequences: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[str]:
    """What follows token sequences, as text.

    Decoding what was there and what follows together keeps the space between them right for every tokenizer.
    """
    both = [[*s, *n] for s, n in zip(sequences, new, strict=True)]
    texts = tokenizer.batch_decode(both, skip_special_tokens=True)
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


_END = re.compile(r"\n|\.(?=\s|$|[A-Z][a-z])")  # "U.S." and "3.5" go on


def answer(text: str) -> str:
    """A continuation cut at the first full stop, newline or end."""
    return _END.split(text.strip(), maxsplit=1)[0].strip()


def ends(text: str) -> bool:
    """Does a sentence end in the text?"""
    return bool(_END.search(text))


def ended(text: str) -> bool:
    """Is a continuation's :func:`answer` what it will be, whatever follows?"""
    text = text.lstrip()
    end = _END.search(text)
    return end is not None and (end[0] == "\n" or end.end() < len(text))  # a last "." may be that of "U.S."


def says(text: str, *expected: str) -> bool:
    """Does a greedy continuation start with one of ``expected``, and end its last word there (case counts)?"""
    text = text.strip()
    return any(
        text.startswith(e) and not within_word(e[-1:], text[len(e) : len(e) + 1]) for e in map(str.strip, expected)
    )


def told(text: str, expected: str) -> bool:
    """Does a continuation so far show whether it :func:`says` ``expected``, strictly and normalised, whatever follows?

    Spaces do not count here, as a tokenizer may take some away once more tokens are there; nor does half a character.
    """
    text, expected = (t.rstrip("\ufffd") for t in (text, expected))
    if not _beyond("".join(text.split()), "".join(expected.split()), 1):
        return False
    wanted = "".join(normalised(expected).split())
    if not wanted or says(text, expected):
        return True
    found = normalised(text)
    if _CITY.startswith(found):
        return False
    # A letter after the object may still turn out to begin the next sentence: "Rome.I" may become "Rome.It".
    return _beyond("".join(_PART_OF_THE.sub("", found).split()), wanted, 2)


_CITY = "city of"  # goes where something follows
_PART_OF_THE = re.compile(r"\bth?$")


def _beyond(text: str, expected: str, by: int) -> bool:
    """Is a text so many characters longer than what was expected, or other?"""
    return len(text) >= len(expected) + by or not expected.startswith(text[: len(expected)])
