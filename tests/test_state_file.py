"""What mosectl keeps for itself: what is not as it was written is told, refused or made again, and never worked with."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mosectl.editing import moments_cache
from mosectl.editing.second_moments import Moments, prepare, second_moments
from mosectl.errors import Notice, OutputError
from mosectl.facts.corpus import Corpus
from mosectl.hypernetwork import train as train_editor
from mosectl.hypernetwork.beforehand import RECORD, STATE, edited_projections, with_validation
from mosectl.hypernetwork.train import train
from mosectl.model.architecture import resolve
from mosectl.storage import schema
from mosectl.storage.state_file import read_state, write_state
from support.commands import run
from support.editors import FEW, TEXT, facts, loaded
from support.facts import CORPUS
from support.json_mutations import fuzzing
from support.models import make_tokenizer, pico
from support.spoiling import flipped, mutated

ANY = schema.mapping(schema.anything)
LOSSES = schema.record({"losses": schema.listed(schema.number)}, others=schema.anything)
TINY = {"hidden_size": 16, "head_dim": 4}


def test_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64).T, "b": torch.tensor(7), "c": torch.tensor([True, False]),
        "d": torch.randn(2, 2).bfloat16(), "e": torch.empty(0, 3),
    }  # fmt: skip
    record = {"n": 1, "x": [1e22, float("inf"), "é"], "o": {"b": None, "a": True}}
    write_state(path, "k", record, tensors)
    found, back = read_state(path, "k", ANY, "", 10**6)
    assert found == record and back.keys() == tensors.keys()
    assert all(torch.equal(back[n], x) and back[n].dtype == x.dtype for n, x in tensors.items())
    first = path.read_bytes()
    write_state(path, "k", record, tensors)
    assert path.read_bytes() == first
    for kind, form, limit, what in (
        ("other", ANY, 10**6, "is damaged, or of another version"),
        ("k", LOSSES, 10**6, "missing or unknown: losses"),
        ("k", schema.mapping(schema.number), 10**6, "must be a number"),
        ("k", ANY, 100, "at most 100 are read"),
    ):
        with pytest.raises(OutputError, match=what):
            read_state(path, kind, form, "", limit)


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_no_changed_byte_is_read(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path_factory.getbasetemp() / "state"
    tensors = {"W": torch.arange(6.0).view(2, 3), "rows": torch.arange(3)}
    write_state(path, "k", {"losses": [1.0, 2.5], "belongs": {"a": "x"}}, tensors)
    path.write_bytes(flipped(path.read_bytes(), chance))
    try:
        record, found = read_state(path, "k", LOSSES, "again", 10**6)
    except OutputError as e:
        assert e.fix == "again" and str(path) in str(e)
    else:  # spaces in the header
        assert record["losses"] == [1.0, 2.5] and all(torch.equal(found[n], x) for n, x in tensors.items())


def test_another_type_of_the_same_bytes(tmp_path: Path) -> None:
    write_state(tmp_path / "x", "k", {}, {"a": torch.ones(2)})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(OutputError, match="checksum"):
        read_state(tmp_path / "x", "k", ANY, "", 10**6)


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 * 10**9)
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    save_file({"a": torch.zeros(2)}, tmp_path / "odd", {"mosectl-k": "[" * 100_000})
    save_file({"a": torch.zeros(2)}, tmp_path / "null", {"mosectl-k": "null"})
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "sparse", "plain", "odd", "null", "zero", "none", "."):
        with pytest.raises(OutputError):
            read_state(tmp_path / name, "k", ANY, "", 10**6)
    with pytest.raises(OutputError, match="damaged"):
        read_state(tmp_path / "sparse", "k", ANY, "", 10**12)


# Statistics.


class Cached:
    """A pico model whose statistics are kept."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "cache"
        monkeypatch.setenv("MOSECTL_CACHE", str(self.folder))
        self.model, self.tokenizer = pico("llama", **TINY), make_tokenizer()
        self.projections = resolve(self.model).projections[:2]
        self.corpus = Corpus("x", tuple(CORPUS.splitlines()))
        self.right = self.asked()
        self.files = sorted((self.folder / "stats").iterdir())

    def asked(self) -> Moments:
        return second_moments(self.model, self.tokenizer, self.projections, self.corpus)

    def again(self) -> str:
        """What is told while they are asked for again; they are the right ones."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", Notice)
            found = self.asked()
        for name, C in self.right.C.items():
            assert torch.equal(found.C[name], C) and torch.equal(found.G[name], self.right.G[name])
        notices = [str(w.message) for w in told if issubclass(w.category, Notice)]
        assert bool(notices) != found.cached
        return "\n".join(notices)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    return Cached(tmp_path, monkeypatch)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": lambda C: -C, "zero": torch.zeros_like, "tiny": lambda C: 1e-9 * C, "int8": lambda C: C.to(torch.int8),
    "another shape": lambda C: C[:5, :5].clone(), "no dimension": lambda C: C[0, 0].clone(), "as it was": lambda C: C,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_statistics_are_made_again(change: str, cached: Cached) -> None:
    assert cached.again() == ""
    stored = load_file(cached.files[0])
    save_file({**stored, "C": CHANGES[change](stored["C"])}, cached.files[0])
    assert str(cached.files[0]) in cached.again()
    assert cached.again() == "", "they are kept again"


@pytest.mark.parametrize("change", ["negative", "int8", "another shape", "no dimension"])
def test_statistics_of_another_form_with_a_checksum(change: str, cached: Cached) -> None:
    record, entry = read_state(cached.files[0], moments_cache.KIND, ANY, "", 10**9)
    write_state(cached.files[0], moments_cache.KIND, record, {**entry, "C": CHANGES[change](entry["C"])})
    assert "made again" in cached.again() and cached.again() == ""


def test_an_entry_in_anothers_place_or_hands(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.files[0].write_bytes(cached.files[1].read_bytes())
    assert "not what belongs there" in cached.again()
    if os.geteuid() == 0:
        os.chown(cached.files[0], 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in cached.again()


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 * 10**9)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda x: x.symlink_to("/dev/zero"), _sparse])
def test_pipes_and_the_like_as_statistics(make: Callable[[Path], None], cached: Cached) -> None:
    cached.files[0].unlink()
    make(cached.files[0])
    assert f"made again: {cached.files[0]}" in cached.again()


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_statistics(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.getbasetemp() / "fuzzed"
        m.setenv("MOSECTL_CACHE", str(folder))
        p = resolve(pico("llama", **TINY)).projections[0]
        entry = {
            "C": torch.eye(p.p), "G": torch.eye(p.d), "tokens": torch.tensor(5), "error": torch.tensor(0.1),
        }  # fmt: skip
        moments_cache.keep("key", {p.name: entry}, strict=True)
        (path,) = (folder / "stats").iterdir()
        if chance.random() < 0.5:
            path.write_bytes(flipped(path.read_bytes(), chance))
        else:
            name = chance.choice(list(entry))
            odd = chance.choice([*CHANGES.values()])(entry[name]) if name in "CG" else torch.zeros(2)
            write_state(path, moments_cache.KIND, mutated({"of": path.stem}, chance), {**entry, name: odd})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", Notice)
            found = moments_cache.cached("key", [p])
        if found:
            assert found[p.name]["C"].shape == (p.p, p.p) and bool(found[p.name]["C"].isfinite().all())
        else:
            assert len(told) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "file"))
    asked = (pico("llama", **TINY), make_tokenizer())
    projections, corpus = resolve(asked[0]).projections[:1], Corpus("x", tuple(CORPUS.splitlines()))
    with pytest.warns(Notice, match="every edit computes them again.*MOSECTL_CACHE"):
        second_moments(*asked, projections, corpus)

    def never(*_: Any) -> None:
        raise AssertionError("computed before the place was looked at")

    monkeypatch.setattr("mosectl.editing.second_moments._accumulate", never)
    with pytest.raises(OutputError):
        second_moments(*asked, projections, corpus, strict=True)


# Trainings.


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a training that was interrupted after its fourth step."""
    path = tmp_path_factory.mktemp("state") / "e.progress"

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(loaded(), facts(), FEW, TEXT, state=path, on_step=stop)
    return path


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_trainings(training: Path, seed: int) -> None:
    chance, path = random.Random(seed), training.with_name("fuzzed")
    record, tensors = read_state(training, STATE, RECORD, "", 10**9)
    if chance.random() < 0.3:
        path.write_bytes(flipped(training.read_bytes(), chance))
    else:
        record = mutated(record, chance)
        if chance.random() < 0.3:
            name = chance.choice(list(tensors))
            tensors[name] = chance.choice([torch.zeros(3), tensors[name].flatten()[:1], tensors[name][None]])
        write_state(path, STATE, record, tensors)
    go_on = _resumable()
    try:
        go_on.load(path)
    except OutputError as e:
        assert "--overwrite" in e.fix
    else:
        assert go_on.finished().history


def _resumable() -> train_editor._Training:
    given = loaded()
    known, unseen = with_validation(facts(), (), FEW)
    return train_editor._Training(given, edited_projections(given.model, FEW), known, unseen, FEW, TEXT)


def test_a_flipped_bit_in_a_training(training: Path) -> None:
    """In a tensor: the file is as well formed as before."""
    path, data = training.with_name("flipped"), bytearray(training.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="checksum"):
        train(loaded(), facts(), FEW, TEXT, state=path, resume=True)


def test_stats_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from support.models import save

    model = save(tmp_path / "m", **TINY)
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "c"))
    (tmp_path / "corpus.txt").write_text(CORPUS)
    asked = ("stats", "--model", model, "--layers", "0", "--corpus", tmp_path / "corpus.txt", "--json")
    assert run(*asked) == 0 and not json.loads(capsys.readouterr().out)["cached"]
    assert run(*asked) == 0 and json.loads(capsys.readouterr().out)["cached"]
    (file,) = (tmp_path / "c" / "stats").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert run(*asked) == 0
    shown = capsys.readouterr()
    assert "made again" in shown.err and not json.loads(shown.out)["cached"]
    assert not prepare(model, "0").cached, "of another corpus"
