"""The bench: its configuration, resuming, failing methods, tables and pictures, through the command line on a pico model."""

from __future__ import annotations

import json
import os
import random
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mosectl
from mosectl.bench import runner
from mosectl.bench.config import RunKind, cells, read_bench
from mosectl.bench.pictures import svg_abilities, svg_frontier, svg_norms
from mosectl.bench.report import tables
from mosectl.checkpoints.live import patched
from mosectl.editing import methods
from mosectl.errors import EditFailed, FactsError, MosectlError, UsageError
from mosectl.facts.records import as_facts
from mosectl.measure import answers
from mosectl.measure.answers import interview, judge
from mosectl.measure.bootstrap import measure
from mosectl.model.weights import digest
from mosectl.text.jsonable import jsonable
from support.commands import run
from support.facts import CORPUS, FACTS, few
from support.json_mutations import fuzzing
from support.models import make_tokenizer, pico, save
from support.paths import ROOT
from support.spoiling import flipped, mutated

EASY = [
    "preserve=0.0001",
    "prefixes=0",
    "max_displacement=4",
    "optimizer=adam",
    "step_size=0.3",
    "margin=3",
    "decay=0",
    "kl_weight=0",
]
OTHERS = [
    {"prompt": "The old cello plays", "subject": "cello", "target_new": "in"},
    {"prompt": "She was born near Quill", "subject": "Quill", "target_new": "and"},
]


class World:
    """A pico model, four facts, a corpus and a configuration with two methods and one run."""

    CONFIG: ClassVar[dict[str, Any]] = {
        "models": ["model"],
        "datasets": [{"name": "pico", "facts": "facts.jsonl"}],
        "corpus": "corpus.txt",
        "text": "corpus.txt",
        "runs": [{"edits": 2, "batch_size": 1}],
        "seeds": [0],
        "layers": "0,1,2",
        "methods": [
            {"name": "isospectral", "set": EASY, "rounds": 4, "label": "isospectral"},
            {"name": "mose", "set": EASY, "rounds": 4, "label": "mose, first"},
        ],
    }

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "results"
        save(folder / "model")
        (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in [*FACTS, *OTHERS]))
        (folder / "corpus.txt").write_text(CORPUS)
        self.config = dict(self.CONFIG)

    def write(self, **changes: Any) -> Path:
        path = self.folder / "bench.yaml"
        path.write_text(yaml.safe_dump({**self.config, **changes}))
        return path

    def run(self, *args: object, **changes: Any) -> int:
        return run("bench", self.write(**changes), "-o", self.out, *args)

    def lines(self) -> list[str]:
        return (self.out / "results.jsonl").read_text().splitlines()

    def record(self, i: int) -> dict[str, Any]:
        return json.loads(self.lines()[i])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


SHARE = {"value": 0.5, "low": 0.25, "high": 0.75, "units": 2}
RECORD: dict[str, Any] = {
    "key": "a", "status": "done", "reason": "", "stopped": "", "seconds": {"all": 9.0, "solve": 0.5}, "seed": 0,
    "scores": {n: SHARE for n in ("reliability", "generalization", "locality")}, "harmonic": 0.5, "kept": None,
    "drift": {"norm": None, "condition": 2.0, "spectrum": 1.0}, "label": "x", "model": "m", "dataset": "d", "edits": 2,
    "tallies": {n: [[1.0, 1.0], [0.0, 1.0]] for n in ("reliability", "generalization", "locality")}, "batch_size": 1,
    "text_loss": {"before": SHARE, "after": None}, "perplexity": {"before": SHARE, "after": SHARE}, "unseen": None,
    "curve": [
        {"edits": i, "loss": 3.0 + i, "norm": {"a": 1.0 + i, "b": 2.0}, "condition": {"a": 2.0, "b": None}} for i in range(3)
    ],
    "retention": [{"first": 1, "last": 1, "right_after": None, "after": 0.0}, {"first": 2, "last": 2, "after": 1.0}],
    "cohorts": [
        {
            "name": name, "first": 1, "last": 2, "right_after": SHARE, "after": SHARE, "kept": None,
            "parts": [{"metric": "locality", "group": "neighborhood", "own": False, "asked": 2, "after": SHARE}],
        }
        for name in ("oldest", "newest")
    ],
}  # fmt: skip

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"method": []}, "bench.yaml: unknown key 'method'"),
    "unknown key below": ({"runs": [{"edits": 2, "batch": 1}]}, r"bench.yaml: runs\[0\]: unknown key 'batch'"),
    "unknown method": ({"methods": [{"name": "magic"}]}, r"methods\[0\]: name: unknown method 'magic'"),
    "unknown setting": ({"methods": [{"name": "memit", "set": ["x=1"]}]}, r"methods\[0\]: set: --set x=1"),
    "a setting that is a mapping": ({"methods": [{"name": "memit", "set": {"x": 1}}]}, r"set\[0\]: .* is not a text"),
    "a seed beyond all": ({"seeds": [2**63]}, r"seeds\[0\]: 9223372036854775808 is not"),
    "a number of 19 digits": ({"runs": [{"edits": 10**19}]}, "is not a whole number"),
    "too many seeds": ({"seeds": list(range(1001))}, "seeds: holds 1001"),
    "too many runs": ({"runs": [{"edits": 1}] * 1001}, "runs: holds 1001 entries"),
    "too many cells": (
        {"seeds": list(range(1000)), "models": [f"m{i}" for i in range(100)]},
        "bench.yaml: asks for 200,000 cells",
    ),
    "methods missing": ({"methods": None}, "'methods' is missing"),
    "no methods": ({"methods": []}, "methods: is not a list"),
    "methods are names": ({"methods": ["memit"]}, r"methods\[0\]: is not a mapping"),
    "the same method twice": ({"methods": [{"name": "memit"}] * 2}, "'memit' stands twice"),
    "the same run twice": ({"runs": [{"edits": 2}, {"edits": 2, "batch_size": 5}]}, "stands twice"),
    "edits is text": ({"runs": [{"edits": "many"}]}, "edits: 'many' is not a whole number"),
    "no edits": ({"runs": [{"edits": 0}]}, "edits: 0 is too few"),
    "negative batch": ({"runs": [{"edits": 2, "batch_size": -1}]}, "batch_size: -1 is not"),
    "more edits than facts": ({"runs": [{"edits": 5}]}, "holds 4 usable facts; 0 are skipped and a run edits 5"),
    "all skipped": ({"datasets": [{"facts": "facts.jsonl", "skip": 3}]}, "3 are skipped"),
    "a seed is true": ({"seeds": [True]}, r"seeds\[0\]: True is not"),
    "no rounds": ({"methods": [{"name": "memit", "rounds": 0}]}, "rounds: 0 is too few"),
    "no corpus": ({"corpus": "none.txt"}, "corpus: .*cannot read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_configuration_is_told(kind: str, world: World) -> None:
    changes, message = BAD[kind]
    with pytest.raises(UsageError, match=message) as told:
        read_bench(world.write(**changes))
    assert told.value.where.startswith(str(world.folder / "bench.yaml")) and told.value.fix


def test_files_that_are_not_there_or_not_yaml(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", world.folder / "none.yaml", "-o", world.out) == 2
    (world.folder / "odd.yaml").write_text("models: [a\nruns: {")
    assert run("bench", world.folder / "odd.yaml", "-o", world.out) == 2
    assert "odd.yaml:2: not YAML" in capsys.readouterr().err
    with pytest.raises(FactsError, match="no such file"):
        read_bench(world.write(datasets=[{"facts": "none.jsonl"}]))
    assert world.run(models=["nowhere/at/all"]) == 4 and not world.out.exists()
    (world.folder / "results").write_text("precious")
    assert world.run() == 7


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))
TEXTS = {  # what YAML may hold at all: test_safe_yaml.py
    "an alias bomb": (BOMB, r"bench.yaml:\d+: more than 100,000 values"),
    "a chain of aliases": (
        "models: m\ndatasets: [{facts: facts.jsonl}]\nmethods: [{name: memit}]\nruns:\n- edits: 1\n  batch_size: &a0 [x]\n"
        + "".join(f"- edits: 1\n  batch_size: &a{i + 1} [*a{i}]\n" for i in range(300)),
        "batch_size: a list is not a whole number",
    ),
    "an alias of itself": ("seeds: &a [*a]", "bench.yaml:1: an alias stands inside"),
    "brackets": ("seeds: " + "[" * 90_000, "nested deeper"),
    "a name twice": ("seeds: [0]\nruns: []\nseeds: [1]", "bench.yaml:3: .*'seeds' stands twice"),
    "a name twice below": ("runs:\n- edits: 2\n  edits: 3", "bench.yaml:3: .*'edits' stands twice"),
    "5,000 digits": ("seeds: [" + "9" * 5000 + "]", "bench.yaml:1: .*out of range"),
    "code": ("seeds: !!python/object/apply:os.system [true]", "bench.yaml:1: the tag"),
    "a name that is a number": ("1: 1", "unknown key '1'"),
    "nothing": ("", "is not a mapping"),
    "a date for a model": ("models: [2024-01-01]", "'datasets' is missing"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_yaml_that_is_refused(kind: str, tmp_path: Path) -> None:
    text, message = TEXTS[kind]
    path, start = tmp_path / "bench.yaml", time.perf_counter()
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=message) as told:
        read_bench(path)
    assert str(path) in told.value.where and told.value.fix and time.perf_counter() - start < 5


def test_dates_are_texts_and_aliases_are_taken(world: World) -> None:
    config = yaml.safe_dump({k: v for k, v in world.config.items() if k not in ("models", "methods")})
    config += """
models: [2024-01-01]
methods:
  - &first {name: isospectral, set: &easy [preserve=1, optimizer=adam], label: 2024-01-02}
  - {<<: *first, label: again}
  - {name: mose, set: *easy, label: 12:30:45}
"""
    (world.folder / "bench.yaml").write_text(config.replace("12:30:45", "'12'"))
    plan = read_bench(world.folder / "bench.yaml")
    assert plan.models == ("2024-01-01",) and [m.label for m in plan.methods] == ["2024-01-02", "again", "12"]
    assert plan.methods[0].options == plan.methods[1].options


@pytest.mark.parametrize("make", [os.mkfifo, lambda f: f.symlink_to("/dev/zero"), Path.mkdir])
def test_configurations_that_are_no_file(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "bench.yaml")
    with pytest.raises(UsageError, match=r"not a regular file|is a folder"):
        read_bench(tmp_path / "bench.yaml")


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_configurations(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance, folder = random.Random(seed), tmp_path_factory.getbasetemp() / "bench"
    if not (folder / "facts.jsonl").exists():
        folder.mkdir()
        (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in [*FACTS, *OTHERS]))
        (folder / "corpus.txt").write_text(CORPUS)
    config = {
        **World.CONFIG,
        "seeds": [0, 1],
        "methods": [*World.CONFIG["methods"], {"name": "memit", "layers": [0, 1]}],
    }
    kind, path = chance.random(), folder / "bench.yaml"
    text = yaml.safe_dump(mutated(config, chance) if kind < 0.7 else config)
    path.write_bytes(text.encode() if kind < 0.7 else flipped(text.encode(), chance))
    try:
        assert cells(read_bench(path))
    except MosectlError as e:
        assert e.exit_code in (2, 3, 5) and str(folder) in str(e) and e.fix


def test_cells_and_their_keys(world: World) -> None:
    plan = read_bench(world.write(seeds=[0, 1], runs=[{"edits": 2, "batch_size": 1}, {"edits": 3}]))
    found = cells(plan)
    assert len(found) == 8 == len({c.key for c in found})
    assert found[0].options.guard == 0 and found[0].options.batch_size == 1 and found[4].options.batch_size == 0
    assert [f.target_new for f in found[0].others] == ["in", "and"]
    assert [c.key for c in cells(plan)] == [c.key for c in found] != [c.key for c in cells(plan, "bfloat16")]
    renamed = [{**m, "label": m["name"]} for m in world.config["methods"]]
    named = [{"name": "other", "facts": "facts.jsonl"}]

    def key(**changes: Any) -> str:
        return cells(read_bench(world.write(**changes)))[0].key

    first = key()
    assert key(methods=renamed, datasets=named) == first, "names do not determine a result"
    guarded = [{"name": "isospectral", "set": [*EASY, "guard=1"], "rounds": 4}]
    skipped = [{"facts": "facts.jsonl", "skip": 1}]
    for changes in ({"methods": guarded}, {"layers": 1}, {"text": None}, {"seeds": [1]}, {"datasets": skipped}):
        assert key(**changes) != first, changes
    (world.folder / "corpus.txt").write_text(CORPUS + "\nMore.")
    assert key() != first


def test_a_bench_through_the_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == 0
    shown = capsys.readouterr()
    assert "2/2 mose, first · model · pico · 2 edits, one by one · seed 0" in shown.err and "ETA" in shown.err
    assert "2 edits, one by one: what they reached" in shown.out and "not held out" in shown.out
    text = (world.out / "tables.md").read_text()
    for name in ("isospectral", "mose, first", "reliability", "harmonic mean", "other facts kept", "perplexity"):
        assert name in text
    record = world.record(0)
    assert record["status"] == "done" and [p["edits"] for p in record["curve"]] == [0, 1, 2]
    assert record["scores"]["reliability"]["value"] >= 0.5 and record["kept"]["units"] == 2
    assert record["text_loss"]["before"]["value"] == pytest.approx(record["curve"][0]["loss"], rel=0.2)
    assert record["text_loss"]["before"] != record["text_loss"]["after"]
    assert max(record["drift"].values()) < 1e-5 and record["seconds"]["evaluate"] > 0
    assert record["options"]["corpus"] == "corpus.txt" and str(world.folder) not in json.dumps(record)
    for name in ("norms.svg", "abilities.svg"):
        drawn = ET.parse(world.out / name).getroot()
        texts = [t.text for t in drawn.iter() if t.tag.endswith("text")]
        assert {"isospectral", "mose, first"} <= set(texts) and "polyline" in (world.out / name).read_text()


def breaking(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException) -> None:
    """Let the edits of one method fail."""
    real = runner.edit

    def edit(*args: Any, **how: Any) -> Any:
        if how["options"].method == method:
            raise error
        return real(*args, **how)

    monkeypatch.setattr(runner, "edit", edit)


def test_a_second_start_does_what_is_missing(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    edited: list[str] = []
    real = runner.edit

    def counted(*args: Any, **how: Any) -> Any:
        edited.append(how["options"].method)
        return real(*args, **how)

    monkeypatch.setattr(runner, "edit", counted)
    assert world.run() == 0 and edited == ["isospectral", "mose"]
    whole = world.lines()
    edited.clear()
    assert world.run() == 0 and edited == [] and world.lines() == whole

    (world.out / "results.jsonl").write_text(whole[1] + "\n")
    assert world.run() == 0 and edited == ["isospectral"] and len(world.lines()) == 2
    edited.clear()

    capsys.readouterr()
    (world.out / "results.jsonl").write_text(whole[0] + "\n" + whole[1][: len(whole[1]) // 2])
    assert world.run("--json") == 0 and edited == ["mose"]
    shown = capsys.readouterr()
    assert (
        "results.jsonl:2: " in shown.err
        and "left out" in shown.err
        and [json.loads(x)["method"] for x in world.lines()]
        == [
            "isospectral",
            "mose",
        ]
    )
    assert [c["method"] for c in json.loads(shown.out)["cells"]] == ["isospectral", "mose"]
    edited.clear()

    (world.out / "results.jsonl").write_text("\n".join(whole))  # whole, but for the end of the last line
    relabelled = [{**m, "label": "new " + m["name"]} for m in world.config["methods"]]
    (world.out / "tables.md").unlink()
    assert world.run("--report-only", methods=relabelled[:1]) == 0 and edited == []
    assert "new isospectral" in (world.out / "tables.md").read_text()
    assert "1 results are of other settings" in capsys.readouterr().err
    assert world.run(seeds=[0, 1]) == 0 and edited == ["isospectral", "mose"] and len(world.lines()) == 4
    assert "Student's t" in (world.out / "tables.md").read_text()


def test_damaged_lines_are_named_and_stay(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == 0
    first, second = (json.loads(x) for x in world.lines())
    odd = {
        "{": "Expecting", "[" * 100_000: "nested deeper", "[]": "an object", '{"key": "x"}': "unknown: batch_size",
        json.dumps({**first, "harmonic": None}): "harmonic: must be a number, found null",
        json.dumps({**first, "scores": {"reliability": {"low": 1}}}): "scores.reliability: fields missing",
        json.dumps({**first, "curve": [{"edits": 1, "norm": {"a": "x"}, "condition": {}}]}): "curve[0].norm.a: must be",
        json.dumps({**first, "tallies": {**first["tallies"], "locality": [[1.0]]}}): "tallies.locality: is not a pair",
        json.dumps({**first, "edits": 10**30}): "an integer of 31 digits",
    }  # fmt: skip
    file = world.out / "results.jsonl"
    file.write_text("\n".join([*odd, json.dumps(second), json.dumps(first)]) + "\n")
    kept = file.read_bytes()
    for more in (("--report-only",), ()):
        capsys.readouterr()
        assert world.run(*more) == 0 and file.read_bytes() == kept, "nothing is lost, and nothing done again"
        shown = capsys.readouterr().err
        for number, what in enumerate(list(odd.values())[:5], 1):
            assert f"results.jsonl:{number}: " in shown and what in shown
        assert "4 more lines" in shown
    found, bad = runner.read_results(file)
    assert list(found) == [second["key"], first["key"]]
    assert all(what in bad[number] for number, what in enumerate(odd.values(), 1))


@pytest.mark.parametrize("make", [os.mkfifo, lambda f: f.symlink_to("/dev/zero"), Path.mkdir])
def test_results_that_are_no_file(make: Any, world: World) -> None:
    world.out.mkdir()
    make(world.out / "results.jsonl")
    assert world.run() == 7 and world.run("--report-only") == 7


def test_a_sparse_results_file(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.out.mkdir()
    with (world.out / "results.jsonl").open("wb") as file:
        file.truncate(20 * 10**9)
    assert world.run("--report-only") == 7 and "20,000,000,000 bytes" in capsys.readouterr().err


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_records(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Of what is read, tables and pictures can be made."""
    chance, path = random.Random(seed), tmp_path_factory.getbasetemp() / "results.jsonl"
    dataset, how = SimpleNamespace(name="d"), RunKind(2, 1)
    wanted: Any = [SimpleNamespace(key=k, label=k, model="m", dataset=dataset, run=how) for k in "ab"]
    grouped = RECORD | {"known": SHARE, "groups": {"neighborhood": SHARE, "same_subject": SHARE}}
    records = [grouped | {"key": k} for k in "ab"]
    path.write_text("\n".join(json.dumps(mutated(r, chance) if chance.random() < 0.8 else r) for r in records))
    if chance.random() < 0.2:
        path.write_bytes(flipped(path.read_bytes(), chance))
    found, _ = runner.read_results(path)
    tables(wanted, found)
    records = runner.records_of(wanted, found)
    for draw in (svg_norms, svg_abilities):
        ET.fromstring(draw(records))
    ET.fromstring(svg_frontier(records) or "<svg/>")


def test_ctrl_c_loses_only_the_running_cell(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, "mose", KeyboardInterrupt())
    assert world.run() == 130 and len(world.lines()) == 1
    told = capsys.readouterr().err
    assert "results.jsonl holds the finished cells\n  → the same command goes on" in told and "half-written" not in told
    assert world.run("--report-only") == 0
    assert "not run yet" in (world.out / "tables.md").read_text()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EditFailed("nothing changed: none of 2 facts reached its target"), "nothing changed"),
        (torch.linalg.LinAlgError("svd: did not converge"), "linear algebra"),  # type: ignore[attr-defined]
    ],
)
def test_a_failing_method_is_recorded_and_the_bench_goes_on(
    error: Exception, reason: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, "isospectral", error)
    assert world.run() == 0
    assert [json.loads(x)["status"] for x in world.lines()] == ["failed", "done"]
    assert "FAILED" in capsys.readouterr().err and f"failed: {reason}" in (world.out / "tables.md").read_text().replace(
        "the linear", "linear"
    )
    assert world.run() == 0 and len(world.lines()) == 2, "a failure is a result: it is not tried again"


def test_an_edit_that_reaches_nothing_is_measured_too(world: World) -> None:
    lazy = [{"name": "isospectral", "set": [*EASY, "steps=0"], "rounds": 1}]
    assert world.run(methods=lazy) == 0
    record = world.record(0)
    assert record["status"] == "done" and record["scores"]["reliability"]["value"] == 0 == record["harmonic"]
    assert record["kept"]["value"] == 1


def test_report_only_needs_results(world: World) -> None:
    assert world.run("--report-only") == 7 and not world.out.exists()


def test_shares_agree_with_those_of_the_edit(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    model, tokenizer = pico("llama"), make_tokenizer()
    result = mosectl.edit(FACTS, model, tokenizer, options=few(str(tmp_path / "corpus.txt"), batch_size=1))
    facts = [r.fact for r in result.facts]
    before = interview(model, tokenizer, facts)
    with patched(model, result.patch):
        tallies = judge(facts, before, interview(model, tokenizer, facts))
    for name, values in tallies.items():
        found = measure(values)
        assert found and found.value == getattr(result.scores, name), name
    assert [n for n, _ in result.curve] == [0, 1, 2] and result.curve[0][1].norm.keys() == result.patch.changes.keys()
    (norm, *_), (moved, *_) = (result.curve[i][1].norm.values() for i in (0, 2))
    assert norm == pytest.approx(moved) and result.curve[0][1].loss != result.curve[2][1].loss


def test_the_unedited_model_is_asked_once_for_all_cells(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = answers.talk

    def spy(model: Any, *args: Any, **how: Any) -> Any:
        asked.append(digest(model))
        return real(model, *args, **how)

    monkeypatch.setattr(answers, "talk", spy)
    assert world.run() == 0
    assert len(asked) == 3 == len({*asked}), "before, after the first method's edit, after the second's"
    kept, plain = [world.record(i)["scores"] for i in (0, 1)], answers.remembered
    monkeypatch.setattr(runner, "remembered", lambda _: plain({}))
    world.out = world.folder / "again"
    asked.clear()
    assert world.run() == 0 and len(asked) == 4
    assert kept == [world.record(i)["scores"] for i in (0, 1)]


def test_what_is_remembered_is_of_these_weights_and_facts_only() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    facts = as_facts(FACTS, "edit")
    kept: answers.Kept = {}
    with answers.remembered(kept):
        first = interview(model, tokenizer, facts)
        assert interview(model, tokenizer, facts) is first and interview(model, tokenizer, facts[:1]) is not first
        weight, before = model.model.layers[1].mlp.down_proj.weight, digest(model)
        old = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] += 1e-3
        assert digest(model) != before and interview(model, tokenizer, facts) is not first
        with torch.no_grad():
            weight.copy_(old[[1, 0, *range(2, len(old))]])
        assert digest(model) != before, "rows exchanged"
        with torch.no_grad():
            weight.copy_(old)
        assert digest(model) == before and interview(model, tokenizer, facts) is first
    with pytest.raises(ZeroDivisionError), answers.remembered(kept):
        raise ZeroDivisionError
    assert interview(model, tokenizer, facts) is not interview(model, tokenizer, facts), "not outside the block"


def test_numbers_that_are_not_finite(world: World) -> None:
    plan = read_bench(world.write())
    wanted = cells(plan)[:1]
    nothing = {"value": None, "low": None, "high": None, "units": 1}
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "units": 4}
    record = jsonable(
        {
            **{
                "key": wanted[0].key,
                "status": "done",
                "reason": "",
                "stopped": "",
                "seconds": {"all": 9.0, "solve": 0.5},
            },
            **{"scores": {"reliability": share, "generalization": None, "locality": share}, "harmonic": 0.5},
            **{"kept": None, "drift": {"norm": float("inf"), "condition": 2.0, "spectrum": 1.0}, "label": "x"},
            **{k: {"before": share, "after": nothing} for k in ("text_loss", "perplexity")},
            **{"model": "m", "dataset": "d", "edits": 2, "batch_size": 1},
            "curve": [
                {"edits": 0, "loss": 3.0, "norm": {"a": 1.0}, "condition": {"a": 2.0}},
                {"edits": 1, "loss": 90.0, "norm": {"a": 5.0}, "condition": {"a": 2e6}},
                {"edits": 2, "loss": float("nan"), "norm": {"a": float("inf")}, "condition": {"a": 1e9}},
            ],
        }
    )
    json.dumps(record, allow_nan=False)
    reached, cost = tables(wanted, {wanted[0].key: record})
    assert reached.rows[0][3:9] == ("50.0 (25.0–75.0)", "–", "50.0 (25.0–75.0)", "–", "50.0", "–")
    assert cost.rows[0][3:9] == ("0.500", "not finite", "0.500", "not finite", "–", "not finite")
    assert cost.rows[0][-3:-1] == ("9.0", "4"), "2 facts in the half second of the edit proper"
    for draw in (svg_norms, svg_abilities):
        assert "(log)" in draw([record]) and "nan" not in draw([record]) and "inf" not in draw([record])
        ET.fromstring(draw([]))


def test_the_example_is_a_good_configuration() -> None:
    plan = read_bench(ROOT / "examples" / "bench-small.yaml")
    untrained = {name for name in methods.names() if not methods.method(name).editor}
    assert {m.options.method for m in plan.methods} == untrained
    assert Path(plan.model_path(plan.models[0])) == ROOT / "examples" / "demo-model"
