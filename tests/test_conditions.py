"""Conditions of probes, from the file to the tables: what the unedited model does not know, its answers cannot build on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mosectl
from mosectl.bench.config import cells, read_bench
from mosectl.bench.report import tables
from mosectl.bench.runner import run_bench
from mosectl.errors import FactsError, PatchError
from mosectl.facts.probe import NotCounted, not_counted
from mosectl.facts.records import Fact, Probe, fact_from_dict, read_facts
from mosectl.facts.writer import lines
from mosectl.hub.cards import card_of
from mosectl.measure.conditions import BOTH, conditions, counting
from mosectl.model import questions
from mosectl.model.positions import Window, fit
from mosectl.model.questions import generate
from mosectl.patch.file import Patch
from mosectl.render import notebook
from mosectl.render.patch_page import _measured
from support.commands import EASY, run
from support.evaluations import World
from support.facts import CORPUS, FACT, few
from support.field_files import RIPPLE, write
from support.models import make_tokenizer, pico, save
from support.patches import patch_for

KNOWN, UNKNOWN, COIN = "The cello", "The sister of Oz is", "The coin of Oz is"  # prompts of conditions
WHY = "the model did not know what they build on"
SAME = "same_subject"


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    """A fact with two locality prompts that count and one that does not, and one portability prompt of each kind."""
    said = generate(pico("llama"), make_tokenizer(), [KNOWN])[0].split()[0]
    met = {"prompt": KNOWN, "ground_truth": "nothing of it", "aliases": [said]}
    unmet, coin = {"prompt": UNKNOWN, "answer": "Ann"}, {"prompt": COIN, "answer": "Mark"}
    return FACT | {
        "locality": {
            "Relation_Specificity": [{"prompt": "Tomas Veldrin plays the", "needs": [met]}],
            "Forgetfulness": [{"prompt": "The old house stood"}],
            "far": [{"prompt": "He was born in", "needs": [met, unmet]}],
        },
        "portability": [{"prompt": "He saw", "answer": "Tomas", "needs": [met]},
                        {"prompt": "Ann saw", "answer": "Oz", "group": "hop", "needs": [coin]}],
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts that are written on, interview by interview."""
    out: list[list[str]] = []
    batches = questions._batches

    def spy(model: Any, wanted: Sequence[Any], *how: Any) -> Any:
        out.append([q.prompt for q in wanted])
        return batches(model, wanted, *how)

    monkeypatch.setattr(questions, "_batches", spy)
    return out


def ripple(conditions: object, condition: str = "OR", metric: str = "Compositionality_I") -> list[dict[str, Any]]:
    """An entry with one more test."""
    rows = deepcopy(RIPPLE[:1])
    query = {"prompt": "The coin of what Tomas met is", "answers": [{"value": "Mark", "aliases": ["Marks", "M"]}]}
    also = {"prompt": "The anthem of what Tomas met is", "answers": [{"value": "Song", "aliases": []}]}
    rows[0][metric] = [{"test_queries": [query, also], "test_condition": condition, "condition_queries": conditions}]
    return rows


# Read and written.


@pytest.mark.parametrize("condition", ["OR", "AND"])
def test_ripple_edits_conditions_are_read(condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"prompt": f"The coin of {x} is ", "answers": answers} for x, answers in {
        "Oz": [{"value": "Mark", "aliases": ["M", "Marks"]}, {"value": "Em", "aliases": []}], "Quill": [], "Ava": [],
    }.items()]  # fmt: skip
    found = read_facts(write("RippleEdits", tmp_path, ripple(asked, condition)))
    needs = (Probe("The coin of Oz is", "Mark", "", ("Em", "Marks")),)
    assert {p.prompt: p.needs for p in found.facts[0].portability if p.group == "Compositionality_I"} == {
        "The coin of what Tomas met is": needs, "The anthem of what Tomas met is": needs
    }, "of every query of the test, whatever test_condition says"  # fmt: skip
    assert ("a condition has no answer in the file (4 times)", "it counts as met") in [
        (p.what, p.fix) for p in found.problems
    ]
    assert run("check", write("RippleEdits", tmp_path, ripple(asked))) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith("Compositionality_I), 5 probes with conditions (4 prompts)"), told


OWN = {"prompt": "x", "ground_truth": "y"}
BAD: dict[str, tuple[Any, str]] = {
    "number": (7, "an entry of 'locality.needs' has no prompt"),
    "no prompt": ([{"ground_truth": "y"}], "an entry of 'locality.needs' has no prompt"),
    "empty prompt": ([OWN, {"prompt": "", "ground_truth": "y"}], "a prompt of 'locality.needs' is empty"),
    "text": (["x"], "a prompt of 'locality.needs' has no answer"),
    "answer": ([{"prompt": "x", "ground_truth": 7}], "an answer of 'locality.needs' is a number"),
    "nested": ([OWN | {"needs": [OWN]}], "a prompt of 'locality.needs' has conditions itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conditions(case: str, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    needs, what = BAD[case]
    file.write_text(f"{json.dumps(FACT)}\n{json.dumps(FACT | {'locality': [{'prompt': 'p', 'needs': needs}]})}\n")
    with pytest.raises(FactsError, match=re.escape(what)) as e:
        read_facts(file)
    assert e.value.where == f"{file}:2" and e.value.fix


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (7, "'Compositionality_I[0].condition_queries' is a number, not a list"),
        (["x"], "'Compositionality_I[0].condition_queries[0]' is text, not an object"),
        ([{"answers": []}], "a prompt of 'Compositionality_I[0].condition_queries[0].prompt' is null, not text"),
        (
            [{"prompt": "x", "answers": 7}],
            "'Compositionality_I[0].condition_queries[0].answers' is a number, not a list",
        ),
    ],
)
def test_bad_conditions_of_ripple_edits(asked: Any, what: str, tmp_path: Path) -> None:
    file = write("RippleEdits", tmp_path, ripple(asked))
    with pytest.raises(FactsError, match=re.escape(what)) as e:
        read_facts(file)
    assert e.value.where == f"{file}[0]" and e.value.fix


def test_what_is_written_is_read_again(row: dict[str, Any], tmp_path: Path) -> None:
    for fact in (fact_from_dict(row, "x"), read_facts(write("RippleEdits", tmp_path, ripple(None))).facts[0]):
        (tmp_path / "again.jsonl").write_bytes(lines([(fact, "not reached")]))
        found = read_facts(tmp_path / "again.jsonl")
        assert replace(found.facts[0], source=fact.source) == fact and not found.problems
    assert "needs" not in json.dumps(Fact("p", "p", "t", locality=(Probe("x"),)).fields()), "as older hashes have it"
    assert fact_from_dict(row, "x").fields() != fact_from_dict(FACT, "x").fields()


# Counted.


def test_which_probes_count() -> None:
    need, other = Probe("a", "b", "", ("c",)), Probe("d", "e")
    probes = (Probe("1", needs=(need,)), Probe("2", "x", SAME, needs=(need, other)), Probe("3", "y", SAME))
    facts = [Fact("p", "p", "t", locality=probes, portability=probes), Fact("q", "q", "t")]
    assert conditions(facts, BOTH) == [need, other]
    found = counting(facts, {"a": " the C, it is", "d": " f"}, BOTH)
    assert found.facts[0].locality == (probes[0], probes[2]) and found.facts[1] == facts[1]
    assert found.facts[0].portability == probes[2:], "the first has no answer, and is not asked"
    assert found.kept == {"locality": ((0, 2), ()), "portability": ((1,), ())}
    assert found.left_out == (
        NotCounted("locality", "", 1, 3), NotCounted("locality", SAME, 1, 2), NotCounted("portability", "", 1, 2),
        NotCounted("portability", SAME, 1, 2),
    )  # fmt: skip
    assert not_counted(found.left_out)[0] == f"1 of 3 locality prompts not counted (same subject 1 of 2): {WHY}"
    assert not counting(facts, None, BOTH).left_out and not counting(facts[1:], {}, BOTH).recorded()


def test_a_condition_that_cannot_be_read_takes_its_probe_along() -> None:
    long = Probe("The old house " * 20, "x")
    fact = Fact(
        "I met Tomas", "Tomas", "and", source="f:1", locality=(Probe("He saw", needs=(long,)), Probe("She saw"))
    )
    kept, problems = fit([fact], make_tokenizer(), Window(30, True, 320))
    assert kept[0].locality == (Probe("She saw"),) and [p.severity for p in problems] == ["error"]
    assert problems[0].what.startswith("the condition 'The old house")


# Asked, and told.


def test_an_edit_leaves_out_what_the_model_did_not_know(
    row: dict[str, Any], asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    how = few(str(tmp_path / "corpus.txt"), wordings=0)
    result = mosectl.edit([row], pico("llama"), make_tokenizer(), options=how)
    before, after = asked[0], asked[-1]
    assert before.count(KNOWN) == before.count(UNKNOWN) == 1 and not {KNOWN, UNKNOWN} & {*after}, (
        "once, and before only"
    )
    assert result.not_counted == (NotCounted("locality", "", 1, 3), NotCounted("locality", "far", 1, 1))
    assert result.scores.locality_prompts == 2
    assert {(s.group, s.asked) for s in result.shares if s.metric == "locality" and not s.own} == {
        ("", 2), (SAME, 1), ("forgetfulness", 1)
    }  # fmt: skip
    assert "He was born in" not in [p.prompt for p in result.probes]
    told = f"1 of 3 locality prompts not counted (far 1 of 1): {WHY}"
    card = card_of(result.patch, "user/repo")
    assert all(told in text for text in (card, notebook.html(result), str(_measured(result.patch))))
    bare = {k: [p if isinstance(p, str) else p["prompt"] for p in v] for k, v in row["locality"].items()}
    other = mosectl.edit([row | {"locality": bare}], pico("llama"), make_tokenizer(), options=how)
    assert other.scores.locality_prompts == 3 and not other.not_counted and "not_counted" not in other.patch.metrics
    result.patch.save(tmp_path / "p.safetensors")
    assert run("inspect", tmp_path / "p.safetensors") == 0
    assert told in capsys.readouterr().out


def test_on_the_command_line(row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(row | {"locality": row["locality"]["far"]}))
    how = (
        "--model",
        save(tmp_path / "m"),
        "-o",
        tmp_path / "p.safetensors",
        *EASY,
        "--set",
        "wordings=0",
        "--overwrite",
    )
    assert run("edit", tmp_path / "f.jsonl", *how) == 0
    shown = capsys.readouterr()
    assert (
        f"1 of 1 locality prompt not counted: {WHY}" in shown.out and "no locality prompts were given" not in shown.err
    )
    assert run("edit", tmp_path / "f.jsonl", *how, "--json") == 0
    assert json.loads(capsys.readouterr().out)["not_counted"] == [
        {"metric": "locality", "group": "", "prompts": 1, "of": 1}
    ]


def test_an_evaluation_leaves_them_out(
    row: dict[str, Any], asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path)
    world.facts.write_text(json.dumps(row))
    assert run(*world.cli("--json", "--html", tmp_path / "t.html", "--probes-csv", tmp_path / "t.csv")) == 0
    found, wanted = json.loads(capsys.readouterr().out), {KNOWN, UNKNOWN, COIN}
    assert wanted < {*asked[0]} and not wanted & {*asked[-1]}
    told = [f"1 of 3 locality prompts not counted (far 1 of 1): {WHY}",
            f"1 of 2 portability prompts not counted (hop 1 of 1): {WHY}"]  # fmt: skip
    assert [n for n in found["notes"] if WHY in n] == told
    assert found["not_counted"][2] == {"metric": "portability", "group": "", "prompts": 1, "of": 2}
    count = {(m["protocol"], m["name"]): m["asked"] for m in found["metrics"] if not m["group"]}
    assert count["qa", "locality"] == 2 and count["generation", "portability"] == count["easyedit", "portability"] == 1
    assert "He was born in" not in (tmp_path / "t.csv").read_text() and told[0] in (tmp_path / "t.html").read_text()
    world.facts.write_text(json.dumps(row | {"portability": row["portability"][1:]}))
    assert run(*world.cli("--fail-under", "portability=0")) == 10
    shown = capsys.readouterr()
    assert f"note: {told[0]}" in shown.out
    assert "generation.portability was not measured: no prompt counts, as the model did not know" in shown.err


def test_without_a_model_from_before_all_count(row: dict[str, Any], tmp_path: Path) -> None:
    world = World(tmp_path)
    found = mosectl.evaluate_edit(world.model, [row], text=world.text, protocols=["generation"])
    assert not found.not_counted and len([p for p in found.probes if not p.own]) == 5
    assert "no model from before the edit: 4 prompts with conditions count whether or not they were met" in str(
        found.notes
    )


def test_a_bench_says_how_many(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    save(tmp_path / "m")
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    (tmp_path / "b.yaml").write_text(
        "models: [m]\ndatasets: [{facts: f.jsonl}]\ncorpus: corpus.txt\nruns: [{edits: 1}]\nlayers: '1'\n"
        "methods: [{name: mose, set: [steps=3, wordings=0]}, {name: mose, label: b, set: [steps=2, wordings=0]}]\n"
    )
    bench = read_bench(tmp_path / "b.yaml")
    found = run_bench(bench, tmp_path / "out")
    assert [r["not_counted"][0] for r in found.values()] == [
        {"metric": "locality", "group": "", "prompts": 1, "of": 3}
    ] * 2
    assert all(sum(w for _, w in r["tallies"]["locality"]) == 2 for r in found.values())
    reached = tables(cells(bench), found)[0]
    assert all({*r["groups"]} == {SAME, "forgetfulness"} for r in found.values())
    told = f"1 of 3 locality prompts not counted (far 1 of 1): {WHY}"
    assert [r[-1] for r in reached.rows] == [told, told]


def test_a_strangers_record_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    replace(patch_for(save(tmp_path / "m")), metrics={"not_counted": [{"metric": "locality"}]}).save(file)
    with pytest.raises(PatchError, match=r"metrics.not_counted\[0\]: fields missing"):
        Patch.load(file)
