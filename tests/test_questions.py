"""Questions asked in one pass: the same answers as one by one and in full, written once, and only as far as is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mosectl.errors import NotFinite, UsageError
from mosectl.measure import qa
from mosectl.model import questions
from mosectl.model.generation import answer, ended, says, told
from mosectl.model.memory import together
from mosectl.model.questions import Need, Question, ask, generate
from support.models import make_tokenizer, pico

PROMPTS = ["I met", "The capital of Avaland is", "He saw Tomas Veldrin in the old house of Lower Quill and", "Tomas"]


def widths(model: Any) -> list[int]:
    """Filled with the rows of every forward that the model does from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        (" Paris", False), (" Paris.", False), (" Paris. I", True), (" U.S", False), (" U.S.", False), (" Paris\n", True),
        ("\n\n", False), ("\nParis", False), (" Paris.It", True), (" 3.5", False), ("", False),
    ],
)  # fmt: skip
def test_an_answer_that_has_ended_stays_what_it_is(text: str, is_it: bool) -> None:
    assert ended(text) == is_it
    if is_it:
        assert answer(text) == answer(text + " and more. Or\nless") == answer(text + "S. x")


@pytest.mark.parametrize("expected", ["Paris", "St. Paul", "Rome, Italy", "é", ""])
@pytest.mark.parametrize(
    "text", [" Paris is", " Parisian", " St. Paul", " St. Paul's", " Rome , Italy.", " é!", "\n Rome"]
)
def test_what_is_told_stays_so(text: str, expected: str) -> None:
    for n in range(len(text) + 1):
        if told(text[:n], expected):
            assert says(text[:n], expected) == says(text, expected) or not expected
    assert told(text + " and so on", expected)
    assert not told("\ufffd", "é"), "half a character may become any"


PIECES = [
    "city",
    " city of",
    "t",
    "th",
    "the",
    "The",
    "a ",
    "It",
    "Rome",
    "rome",
    "Rom",
    "St",
    "U.S.",
    "罗",
    " ",
    ".",
    ". ",
    "\n",
    "'s",
]
EXPECTED = [
    "Rome",
    "the Rome",
    "City",
    "Rome, Italy",
    "U.S.",
    "St. Paul",
    "City of Rome",
    "The",
    "罗马",
    "t",
    "It",
    "Rome It",
]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.sampled_from(EXPECTED))
@example("city of Rome", "rome")
@example("the Rome", "Rome")
@example("the romans", "Rome")
@example(" rome.It", "Rome")
@example(" rome then", "Rome The")
def test_what_is_told_stays_so_as_qa_compares_too(text: str, expected: str) -> None:
    for n in range(len(text) + 1):
        if told(text[:n], expected):
            assert qa.says(text[:n], expected) == qa.says(text, expected)
            assert says(text[:n], expected) == says(text, expected)
    assert told(text + " and so on, and on", expected)


@pytest.mark.parametrize("need", list(Need))
def test_the_same_as_one_by_one(need: Need) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    whole = [generate(model, tokenizer, [p], max_new_tokens=9)[0] for p in PROMPTS]
    asked = [Question(p, 9, need, frozenset({"Brinmouth"})) for p in PROMPTS]
    for size in (None, 1, 3):
        texts = ask(model, tokenizer, asked, batch_size=size)
        assert all(full.startswith(text) for full, text in zip(whole, texts, strict=True))
        assert [says(t, "Brinmouth") for t in texts] == [says(t, "Brinmouth") for t in whole]
        if need >= Need.ANSWER:
            assert [answer(t) for t in texts] == [answer(t) for t in whole]
    assert ask(model, tokenizer, []) == []


def test_no_more_tokens_than_it_takes_to_tell() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    rows = widths(model)
    model.generation_config.eos_token_id = None
    ask(model, tokenizer, [Question(p, 20, Need.ALL, frozenset({"zzz"})) for p in PROMPTS])
    assert len(rows) == 20
    rows.clear()
    ask(model, tokenizer, [Question(p, 20, Need.SAYS, frozenset({"zzz"})) for p in PROMPTS])
    assert len(rows) <= 10  # special tokens and halves of letters tell nothing


def test_what_is_asked_twice_is_written_once_and_cut_for_each() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    model.generation_config.eos_token_id = None
    rows = widths(model)
    done: list[tuple[int, int]] = []
    p, expected = PROMPTS[0], frozenset({"x"})
    asked = [Question(p, 2, Need.SAYS, expected), Question(p, 9), Question(PROMPTS[1], 9), Question(p, 4, Need.ANSWER)]
    texts = ask(model, tokenizer, asked, on_step=lambda *at: done.append(at))
    assert set(rows) == {2} and len(rows) == 9 and done == [(2, 2)]
    assert texts[:2] == [generate(model, tokenizer, [p], max_new_tokens=n)[0] for n in (2, 9)]
    assert texts[3] == generate(model, tokenizer, [p], max_new_tokens=4)[0] and len(texts[3]) < len(texts[1])


def test_prompts_of_like_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    lengths: list[list[int]] = []
    real = questions.following

    def spy(*args: Any, **how: Any) -> Any:
        lengths.append([len(s) for s in args[2]])
        return real(*args, **how)

    monkeypatch.setattr(questions, "following", spy)
    monkeypatch.setattr(questions, "together", lambda *_: 2)
    generate(model, tokenizer, PROMPTS)
    assert [n for part in lengths for n in part] == sorted((n for part in lengths for n in part), reverse=True)
    assert [len(part) for part in lengths] == [2, 2]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    whole, real = generate(model, tokenizer, PROMPTS), questions.following

    def small(*args: Any, **how: Any) -> Any:
        if len(args[2]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **how)

    monkeypatch.setattr(questions, "following", small)
    assert generate(model, tokenizer, PROMPTS) == whole


def test_failures_are_told() -> None:
    model, tokenizer = pico("gpt2", n_positions=24), make_tokenizer()
    with pytest.raises(UsageError, match="the model reads 24"):
        ask(model, tokenizer, [Question("I met", 3), Question("the house " * 30, 3)])
    with torch.no_grad():
        model.transformer.wpe.weight[5:] = torch.nan
    with pytest.raises(NotFinite):
        ask(model, tokenizer, [Question(p, 9, Need.SAYS, frozenset({"zzz"})) for p in PROMPTS[:2]])


def test_batches_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("llama")
    assert together(model, 20, 1) == 32 and together(model, 10**9, 1) == 1
    monkeypatch.setattr("mosectl.model.memory.ROWS", {})
    assert together(model, 20, 1) > 32
    few, many = together(model, 10_000, 1), together(model, 5_000, 1)
    assert few < many < 3 * few
