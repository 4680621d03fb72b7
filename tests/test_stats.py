"""Corpora: files from anywhere."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosectl.editing import guard, second_moments
from mosectl.editing.enough_text import Work
from mosectl.errors import UsageError
from mosectl.facts import corpus
from mosectl.facts.corpus import Corpus, read_corpus
from mosectl.model.architecture import resolve
from support.json_mutations import fuzzing
from support.models import make_tokenizer, pico
from support.spoiling import flipped, mutated


def sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(20 * 10**9)


WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "pipe": ("c.txt", os.mkfifo, "not a regular file"),
    "device": ("c.txt", lambda f: f.symlink_to("/dev/zero"), "not a regular file"),
    "sparse": ("c.txt", sparse, "20,000,000,000 bytes"),
    "folder": ("c.txt", Path.mkdir, "is a folder"),
    "not UTF-8": ("c.txt", lambda f: f.write_bytes(b"good\nb\xffd\n"), r"c.txt:2: .*not UTF-8 text \(byte 6\)"),
    "binary": ("c.txt", lambda f: f.write_bytes(b"good\nb\0d\n"), "c.txt:2: .*a binary file"),
    "empty": ("c.txt", lambda f: f.write_bytes(b" \n\n"), "holds no text"),
    "one line": ("c.txt", lambda f: f.write_bytes(b"word " * 3_000_000), "a text of 15,000,000 characters"),
    "not JSON": ("c.jsonl", lambda f: f.write_text('{"text": "a"}\n\n{"text"'), "c.jsonl:3: not a corpus: Expecting"),
    "no text": (
        "c.jsonl",
        lambda f: f.write_text('{"text": "a"}\n{"txt": "a"}'),
        "c.jsonl:2: .*missing or unknown: text",
    ),
    "a number": ("c.jsonl", lambda f: f.write_text('{"text": 1}'), "c.jsonl:1: .*text: must be a text"),
    "a list": ("c.jsonl", lambda f: f.write_text('["text"]'), "c.jsonl:1: .*must be an object"),
    "half a character": ("c.jsonl", lambda f: f.write_text(r'{"text": "\ud800"}'), "c.jsonl:1: .*surrogates"),
    "brackets": ("c.jsonl", lambda f: f.write_text("[" * 100_000), "c.jsonl:1: .*nested deeper"),
    "a large number": ("c.jsonl", lambda f: f.write_text('{"n": ' + "9" * 5000 + "}"), "c.jsonl:1: .*5000 digits"),
    "twice": ("c.jsonl", lambda f: f.write_text('{"text": "a", "text": "b"}'), "c.jsonl:1: .*'text' stands twice"),
    "nothing in it": ("c.jsonl", lambda f: f.write_text('{"text": " "}'), "holds no text"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_corpora_that_are_refused(kind: str, tmp_path: Path) -> None:
    name, make, what = WRONG[kind]
    make(tmp_path / name)
    start = time.perf_counter()
    with pytest.raises(UsageError, match=what) as told:
        read_corpus(tmp_path / name)
    assert time.perf_counter() - start < 5 and str(tmp_path / name) in str(told.value) and told.value.fix


def test_corpora_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")
    assert read_corpus(tmp_path / "c.txt").texts == ("one", " two ")
    lines = [{"text": "a\u2028b", "id": 1}, {"text": "é\nc"}]
    (tmp_path / "c.jsonl").write_text("\r\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\r\n")
    assert read_corpus(tmp_path / "c.jsonl").texts == ("a\u2028b", "é\nc")


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_corpora(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path_factory.getbasetemp() / "c.jsonl"
    rows = [{"text": "The capital", "meta": {"n": [1, 2.5, None]}}, {"text": "of Avaland 🦊"}]
    path.write_text("\n".join(json.dumps(mutated(row, chance) if chance.random() < 0.7 else row) for row in rows))
    if chance.random() < 0.3 and path.stat().st_size:
        path.write_bytes(flipped(path.read_bytes(), chance))
    try:
        assert all(isinstance(t, str) for t in read_corpus(path).texts)
    except UsageError as e:
        assert str(path) in str(e) and e.fix


def test_a_long_text_is_not_tokenised_whole() -> None:
    """Nothing else is read of it: only its beginning is used."""
    asked: list[int] = []
    tokenizer = make_tokenizer()

    def counted(text: str, **how: Any) -> Any:
        asked.append(len(text))
        return tokenizer(text, **how)

    text = "The capital of Avaland is Brinmouth. " * 100_000
    blocks = second_moments._blocks(counted, corpus.Corpus("x", (text,)), 10_000, 4096)
    assert blocks == second_moments._blocks(tokenizer, corpus.Corpus("x", (text,)), 10_000, 4096)
    assert guard.canaries(counted, [text]) == guard.canaries(tokenizer, [text])
    assert max(asked) <= second_moments.BEGINNING


def test_a_sample_of_the_positions_gives_the_same_G(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[g gᵀ] is a sum over positions whose labels are independent: a part of them gives that part of it."""
    model, tokenizer = pico("llama"), make_tokenizer()
    projections = list(resolve(model).projections)
    texts = tuple(
        f"The capital of Brinmouth is Lower Quill {i} and Tomas Veldrin plays the cello {i}." for i in range(300)
    )
    text = Corpus("x", texts)

    def found(asked: int, tokens: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(second_moments, "ASKED", asked)
        monkeypatch.setattr(second_moments, "PER_DIRECTION", tokens)
        return second_moments.second_moments(model, tokenizer, projections, text, cache=False).G

    whole, part = found(1, 10**9), found(4, 100)
    for name, G in whole.items():
        assert float((part[name] - G).norm() / G.norm()) < 0.35
        assert abs(float(part[name].trace() / G.trace()) - 1) < 0.1


def test_gradients_are_taken_of_one_text_at_least() -> None:
    first = [[[0] * 5] * 3, [[0] * 9] * 2]
    assert second_moments._with_gradients(first, 1e-9) == [[False] * 3, [False, True]]
    assert second_moments._with_gradients(first, 1.0) == [[True] * 3, [True] * 2]
    assert second_moments._with_gradients([], 1.0) == []


def test_where_the_work_ends() -> None:
    """Blocks of two, three and two batches of ten tokens: whole ones are read, the first takes longer."""
    batches = [(i, block, [[0] * 5, [0] * 5]) for i, block in enumerate([0, 0, 1, 1, 1, 2, 2])]
    work = Work(batches, 0.1, 1.0)
    assert work.so_far(1) == (400, 1300), "as if all were read"
    for done, error, end in (
        (1, 0.1, 2),
        (2, 0.1, 2),
        (2, 0.11, 5),
        (1, 0.2, 5),
        (2, 0.15, 5),
        (2, 9.0, 7),
        (1, math.inf, 7),
    ):
        work.foresee(done, error)
        assert work.end == end, (done, error)
    work.foresee(5, 0.1)
    assert work.so_far(5) == (1100, 1100)
