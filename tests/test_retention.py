"""What is left of facts by their place in a run: cohorts and curves, what edits record for them, where they are shown."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich.console
import yaml

import mosectl
from mosectl.bench.config import RunKind
from mosectl.bench.pictures import svg_retention
from mosectl.bench.report import tables
from mosectl.editing.batches import Batches
from mosectl.editing.guard import Health
from mosectl.errors import NotFinite
from mosectl.facts.records import Fact, Probe, fact_from_dict
from mosectl.measure import evaluate as evaluation
from mosectl.measure.before_after import _subject
from mosectl.measure.metrics import Sides, held
from mosectl.measure.protocols import Answers
from mosectl.measure.retention import cohorts, curve, places
from mosectl.model.generation import says
from mosectl.patch.compose import merge
from mosectl.patch.file import Patch
from mosectl.patch.record import PatchFact
from mosectl.render import console, html, scores, terminal
from mosectl.storage.progress import BatchDone, Clock
from support.commands import run
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico, save
from support.patches import patch_for

# Cohorts and curves.


def test_a_hundred_of_each_or_a_tenth_or_none() -> None:
    assert places(29) == {}
    assert places(30) == {"oldest": range(10), "middle": range(10, 20), "newest": range(20, 30)}
    assert places(299) == {"oldest": range(29), "middle": range(135, 164), "newest": range(270, 299)}
    assert places(300) == {"oldest": range(100), "middle": range(100, 200), "newest": range(200, 300)}
    assert places(1000) == {"oldest": range(100), "middle": range(450, 550), "newest": range(900, 1000)}


def test_bins_are_of_equal_size() -> None:
    for n, bins, last in ((1, 1, 1), (20, 20, 1), (24, 12, 2), (2000, 20, 100), (41, 14, 2)):
        found = curve([i < n // 2 for i in range(n)], [None] * n)
        assert len(found) == bins <= 20 and found[-1].last == n and found[-1].last - found[-1].first + 1 == last
        assert sum(b.after * (b.last - b.first + 1) for b in found) == pytest.approx(n // 2)
        assert [b.first for b in found[1:]] == [b.last + 1 for b in found[:-1]]
        assert all(b.right_after is None for b in found)
    short = curve([True] * 30, [True, None, False] * 10, of=100, least=10)
    assert [(b.first, b.last, b.right_after) for b in short] == [(1, 10, 4 / 7), (11, 20, 0.5), (21, 30, 3 / 7)]
    assert [b.last for b in curve([True] * 30, [None] * 30, of=400)] == [20, 30], "bins of the run as it was asked for"


def fact(i: int) -> Fact:
    probes = (
        Probe(f"near {i}", "n", "neighborhood"),
        Probe(f"same {i}", "s", "same_subject"),
        Probe(f"odd {i}", "o", "Odd"),
    )
    return Fact(f"P{i} is", f"P{i}", "new", "old", (f"We know P{i} is",), probes)


def answers(i: int, said: str, near: str = "n", same: str = "s", again: str = "old") -> Answers:
    return Answers(said, (again,), (near, same, "o"), (), {})


def test_each_cohort_is_told_by_its_own_facts() -> None:
    """Of 40 facts, 2 of the first ten did not hold right after; of the other 8 a half is lost; the newest all hold."""
    facts = [fact(i) for i in range(40)]
    then: list[str | None] = ["other" if i < 2 else "new" for i in range(40)]
    lost = range(2, 6)
    now = [
        answers(i, "old" if i in lost else "new", "x" if i < 5 else "n", again="new" if i > 29 else "x")
        for i in range(40)
    ]
    before = [answers(i, "old") for i in range(40)]
    oldest, middle, newest = cohorts(facts, then, now, before)
    assert (oldest.label, middle.label, newest.label) == ("oldest 1-10", "middle 16-25", "newest 31-40")
    assert oldest.right_after and oldest.kept and oldest.right_after.value == 0.8 and oldest.right_after.units == 10
    assert oldest.after.value == 0.6, "one that was not reached at first counts at the end, too"
    assert (oldest.kept.value, oldest.kept.units) == (0.5, 8) and 0 < oldest.kept.low < 0.5 < oldest.kept.high < 1
    assert middle.kept and newest.kept and middle.kept.value == newest.kept.value == newest.after.value == 1
    assert newest.after.low == pytest.approx(1 - 1.96**2 / (10 + 1.96**2)), "Wilson's, as nothing varied"
    parts = {(p.metric, p.group): p for p in oldest.parts}
    assert [*parts] == [
        ("generalization", "known wordings"), ("locality", "neighborhood"), ("locality", "same_subject"),
    ], "other groups are not told by cohort"  # fmt: skip
    near = parts["locality", "neighborhood"]
    assert near.after.value == 0.5 and near.asked == 10 and parts["locality", "same_subject"].after.value == 1
    assert [c.parts[0].after.value for c in (oldest, middle, newest)] == [0, 0, 1]


def test_what_is_not_known_is_not_made_up() -> None:
    facts, now = [fact(i) for i in range(30)], [answers(i, "new") for i in range(30)]
    found = cohorts(facts, [None] * 30, now, None)
    assert all(c.right_after is None and c.kept is None and c.after.value == 1 for c in found)
    assert {p.group for c in found for p in c.parts} == {"neighborhood", "same_subject"}, "nobody knows what was known"
    half: list[str | None] = ["new" if i < 5 else None for i in range(30)]
    oldest = cohorts(facts, half, now, None)[0]
    assert oldest.right_after and oldest.right_after.units == 5
    nothing = cohorts(facts, ["old"] * 30, now, None)[0]
    assert nothing.right_after and nothing.right_after.value == 0 and nothing.kept is None
    assert cohorts(facts[:29], [None] * 29, now[:29], None) == ()


# What an edit records.

HARD = {"prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "of"}
ALL = [fact_from_dict(f, "x") for f in [*FACTS, HARD]]


def test_a_run_in_batches_records_what_was_said_right_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    folder, options = (
        save(tmp_path / "m"),
        few(str(tmp_path / "corpus.txt"), previous_edit_weight=0.0, replay_margin=0.0),
    )
    heard: list[str] = []
    real = Batches.ended

    def ended(batches: Batches, *args: Any, **how: Any) -> None:
        start = len(batches.right_after)
        asked = [f.prompt for f in ALL[start : start + batches.size]]
        model, tokenizer = batches.loaded.model, batches.loaded.tokenizer
        ids = [tokenizer(p, return_tensors="pt")["input_ids"] for p in asked]
        heard.extend(tokenizer.decode([int(model(i).logits[0, -1].argmax())]).strip() for i in ids)
        real(batches, *args, **how)

    monkeypatch.setattr(Batches, "ended", ended)
    made = mosectl.edit(ALL, folder, options=replace(options, batch_size=1), refuse=False)
    then = [r.right_after for r in made.facts]
    assert [t is not None and t.startswith(h) for t, h in zip(then, heard, strict=True)] == [True] * 3
    assert [r.held_right_after for r in made.facts] == [True, True, says(str(then[2]), "of")]
    made.patch.save(tmp_path / "p.safetensors")
    assert [f.right_after for f in Patch.load(tmp_path / "p.safetensors").facts] == then
    assert "ask batch" in made.seconds
    whole = mosectl.edit(ALL, folder, options=options, refuse=False)
    assert [r.right_after for r in whole.facts] == [r.held_right_after for r in whole.facts] == [None] * 3
    assert not any("right_after" in f for f in whole.patch.to_record()["facts"]) and "ask batch" not in whole.seconds


class Ear:
    """A progress callback that hears of batches."""

    def __init__(self) -> None:
        self.told: list[BatchDone] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        pass

    def batch(self, done: BatchDone) -> None:
        self.told.append(done)


def batches(size: int, ear: Any) -> Batches:
    from mosectl.model.loading import Loaded

    return Batches(Loaded(pico("llama"), make_tokenizer(), None), ALL, size, False, Clock(ear))


BASE, NOW = Health(3.0, {"a": 2.0, "b": 1.0}, {}), Health(3.25, {"a": 2.1, "b": 0.8}, {})


def says_in_turn(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[list[str]]:
    """Let the model answer so; returns the prompts it is asked, by batch."""
    said, asked = iter(answers), []

    def ask(_: Any, __: Any, questions: Any, **___: Any) -> list[str]:
        asked.append([q.prompt for q in questions])
        return [next(said) for _ in questions]

    monkeypatch.setattr("mosectl.editing.batches.ask", ask)
    return asked


def test_a_batch_tells_how_the_run_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    ear, (a, b, c) = Ear(), (f.target_new for f in ALL)
    asked = says_in_turn(monkeypatch, f"{a} it is", b, "no", c, "lost")
    run = batches(1, ear)
    run.ended(BASE, NOW, text=True)
    run.ended(BASE, NOW, text=True)
    run.ended(BASE, BASE, text=False)
    first, second, last = ear.told
    assert [len(prompts) for prompts in asked] == [1, 2, 2] and asked[1] == [ALL[1].prompt, ALL[0].prompt]
    assert asked[2][0] == ALL[2].prompt and asked[2][1] in (ALL[0].prompt, ALL[1].prompt), "as many earlier ones"
    assert (first.number, first.batches, first.facts, first.total) == (1, 3, 1, 3)
    assert (first.held, first.earlier_held, first.earlier_asked) == (1, 0, 0)
    assert (second.held, second.earlier_held, second.earlier_asked) == (2, 0, 1), "the first holds no longer"
    assert (last.held, last.earlier_held, last.earlier_asked) == (3, 0, 2), "right after, and now"
    assert first.text_loss == 0.25 and first.norm_drift == pytest.approx(0.2) and first.seconds_left > 0
    assert last.text_loss is None and last.norm_drift == last.seconds_left == 0
    assert len(run.right_after) == 3


def test_one_batch_is_the_run_and_nobody_needs_to_hear() -> None:
    batches(2, None).ended(BASE, NOW, text=True)
    batches(2, lambda *_: None).ended(BASE, NOW, text=True)
    ear = Ear()
    alone = batches(3, ear)
    alone.ended(BASE, NOW, text=True)
    assert alone.right_after == [] and not ear.told


def test_only_what_was_asked_lately_tells_of_earlier_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosectl.editing.batches.LATELY", 1)
    ear, (a, b, c) = Ear(), (f.target_new for f in ALL)
    says_in_turn(monkeypatch, a, b, "lost", c, "lost")
    run = batches(1, ear)
    for _ in ALL:
        run.ended(BASE, NOW, text=True)
    assert [t.earlier_asked for t in ear.told] == [0, 1, 1]


def test_a_run_that_goes_on_counts_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear()
    says_in_turn(monkeypatch, "x", "x")
    run = batches(1, ear)
    run.go_on([ALL[0].target_new, "x"])
    run.ended(BASE, NOW, text=True)
    (told,) = ear.told
    assert (told.number, told.facts, told.held, told.earlier_asked) == (3, 3, 1, 1) and len(run.right_after) == 3


def test_a_model_whose_numbers_are_not_finite_has_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> list[str]:
        raise NotFinite("logits are not finite")

    monkeypatch.setattr("mosectl.editing.batches.ask", ask)
    ear = Ear()
    run = batches(2, ear)
    run.ended(BASE, NOW, text=True)
    assert run.right_after == ["", ""] and ear.told[0].held == 0


# Progress.

DONE = BatchDone(3, 10, 30, 100, 28, 17, 20, 0.0123, 1.2e-8, 4242.4)
LINES = [
    "batch 3/10 done, at this pace 4,242 s more: 28 of 30 facts held right after",
    "earlier facts: 17 of 20 hold, text loss +0.012 nats a token, ‖W‖ drift 1.2e-08",
]


def test_on_a_pipe_a_batch_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as step:
        step("targets", 0, 10)
        step.batch(DONE)  # type: ignore[attr-defined]
        step.batch(replace(DONE, number=10, text_loss=None, earlier_asked=0))  # type: ignore[attr-defined]
    last = "batch 10/10 done: 28 of 30 facts held right after, ‖W‖ drift 1.2e-08"
    assert capsys.readouterr().err.splitlines() == ["targets …", ", ".join(LINES), last]
    with console.progress(quiet=True) as step:
        step("targets", 0, 10)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_last_batch_stands_below_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "_err", lambda: rich.console.Console(file=out, force_terminal=True, width=80))
    with console.progress() as step:
        step("targets", 3, 10)
        assert isinstance(step, console.Bars)
        assert len([*step.get_renderables()]) == 1
        step.batch(replace(DONE, number=2))
        step.batch(DONE)
        _, *below = step.get_renderables()
        assert [*map(str, below)] == LINES
    assert "\n".join(LINES) in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "")


# What eval shows.


def recorded(i: int, status: str = "changed", then: str | None = None) -> PatchFact:
    return PatchFact(
        f"P{i} is", f"P{i}", "new", "old", "new" if status == "changed" else "x", 0.1, 0.9, status, right_after=then
    )


def patch(folder: Path, *facts: PatchFact, size: int | None = None, seed: int = 0) -> Patch:
    options = {} if size is None else {"batch_size": size}
    return replace(patch_for(folder, seed=seed), facts=facts, options=options)


def test_right_after_is_that_of_a_facts_own_batch(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")

    def then(*patches: Patch) -> tuple[list[str | None], bool]:
        subject = _subject("patch", "p", None, [*patches])
        return [r.right_after for r in subject.records], subject.in_order

    known = recorded(0, "not reached", "new"), recorded(1, "changed", "y")
    assert [held(r) for r in known] == [True, False] and [held(recorded(0)), held(recorded(0, "not reached"))] == [
        True,
        False,
    ]
    assert then(patch(folder, *known, size=1)) == (["new", "y"], True)
    two = recorded(0), recorded(1, "not reached")
    assert then(patch(folder, *two, size=0)) == then(patch(folder, *two, size=2)) == (["new", "x"], False), "one batch"
    assert then(patch(folder, *two, size=1)) == ([None, None], True), "an older patch: only its end is known"
    assert then(patch(folder, *two)) == ([None, None], False), "nor is anything of one that does not say"
    first, second = patch(folder, *two, size=0), patch(folder, recorded(2), size=0, seed=1)
    assert then(first, second) == then(merge([first, second])) == (["new", "x", "new"], True), "patch after patch"
    older = patch(folder, recorded(2), recorded(3), size=1, seed=1)
    assert then(merge([merge([first, older]), replace(second, seed=2)]))[0] == ["new", "x", None, None, "new"]


def test_cohorts_stand_in_the_order_of_the_edit(tmp_path: Path) -> None:
    """The file is shuffled, two facts of it are in no patch, and one was edited twice."""
    folder, n = save(tmp_path / "m"), 30
    edited = [recorded(i, then="new" if i % 2 else "old") for i in range(n)]
    subject = _subject("patch", "p", None, [patch(folder, recorded(29, then="old"), *edited, size=1)])
    order = [(7 * i) % 32 for i in range(32)]
    facts = [fact(i) for i in order]
    sides = Sides([answers(i, "new" if i >= 10 else "old") for i in order], [answers(i, "old") for i in order])
    oldest, middle, newest = evaluation._cohorts(facts, subject, sides)
    assert [c.after.value for c in (oldest, middle, newest)] == [0, 1, 1]
    assert all(c.right_after and c.right_after.value == 0.5 for c in (oldest, middle, newest))
    assert newest.last == n, "facts that no patch holds are not of the run"


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What eval shows of a patch of 30 facts in batches of ten: JSON, terminal, page."""
    folder = save(tmp_path / "m")
    rows = [{"prompt": f"I met {i} Tomas", "subject": "Tomas", "target_new": "and", "rephrase_prompts": ["We met Tomas"],
             "locality": {"neighborhood": [{"prompt": "The old house"}]}} for i in range(30)]  # fmt: skip
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("The capital of Avaland is Brinmouth.\nTomas plays the cello in Lower Quill.\n")
    facts = [
        PatchFact(
            str(r["prompt"]), "Tomas", "and", "b", "x", 0.1, 0.9, "not reached", right_after="and" if i < 20 else "x"
        )
        for i, r in enumerate(rows)
    ]
    found: dict[str, Any] = {}
    for name, size in (("batches", 10), ("one", 0)):
        how = facts if size else [replace(f, right_after=None) for f in facts]
        patch(folder, *how, size=size).save(tmp_path / f"{name}.safetensors")
        args = [
            tmp_path / f"{name}.safetensors",
            tmp_path / "facts.jsonl",
            "--model",
            folder,
            "--text",
            tmp_path / "text.txt",
        ]
        page = tmp_path / f"{name}.html"
        assert run("eval", *args, "--protocol", "generation", "--html", page, "--json") == 0
        found[name] = json.loads(capsys.readouterr().out), page.read_text()
    return found


def test_eval_shows_cohorts_of_a_run_in_batches_alone(evaluated: dict[str, Any]) -> None:
    (batches, page), (one, without) = evaluated["batches"], evaluated["one"]
    assert one["cohorts"] == [] and scores.COHORTS_TITLE not in without
    told = [(c["name"], c["first"], c["last"], c["right_after"]["value"]) for c in batches["cohorts"]]
    assert told == [("oldest", 1, 10, 1.0), ("middle", 11, 20, 1.0), ("newest", 21, 30, 0.0)]
    assert batches["cohorts"][0]["kept"]["units"] == 10 and batches["cohorts"][2]["kept"] is None
    assert [f["held_right_after"] for f in batches["facts"]] == [True] * 20 + [False] * 10
    assert batches["facts"][0]["right_after"] == "and" and one["facts"][0]["right_after"] == "x"
    assert scores.COHORTS_TITLE in page and "oldest 1-10" in page and "neighbours (QA)" in page
    assert [m["right_after"]["value"] for m in batches["metrics"] if m["name"] == "reliability"] == [
        pytest.approx(2 / 3)
    ]


def test_the_terminal_and_the_page_have_a_row_for_each_share(capsys: pytest.CaptureFixture[str]) -> None:
    facts = [fact(i) for i in range(30)]
    found = cohorts(
        facts, ["new"] * 30, [answers(i, "new" if i > 4 else "x") for i in range(30)], [answers(0, "old")] * 30
    )
    rows = scores.of_cohorts(found)
    assert rows[0] == ("oldest 1-10", "reliability", "100.0%", "50.0%", rows[0][4], "10") and "–" in rows[0][4]
    assert rows[1][:4] == ("oldest 1-10", "  kept", "–", "50.0%")
    assert [r[1] for r in rows[2:5]] == ["known wordings (QA)", "neighbours (QA)", "same subject (QA)"] and len(
        rows
    ) == 15
    own = replace(found[0].parts[2], own=True)
    assert scores.of_cohorts([replace(found[0], parts=(own,))])[2][1] == "same subject (own probes) (QA)"
    (drawn,) = html.cohorts_table(found)
    assert len(drawn.rows) == 15 and drawn.rows == tuple(rows) and scores.COHORTS_HELP[1:] in drawn.about
    terminal._kept([])
    assert capsys.readouterr().out == ""


# What bench records and draws.


def record(label: str, bins: list[tuple[int, int, float | None, float]], **changes: Any) -> dict[str, Any]:
    retention = [{"first": a, "last": b, "right_after": then, "after": now} for a, b, then, now in bins]
    return {
        "status": "done", "label": label, "model": "m", "dataset": "d", "edits": 40, "batch_size": 10, "seed": 0,
        "retention": retention, **changes,
    }  # fmt: skip


SVG = "{http://www.w3.org/2000/svg}"


def drawn(*records: dict[str, Any]) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """The curves, and all texts."""
    root = ET.fromstring(svg_retention(records) or "")
    lines = [[tuple(map(float, p.split(","))) for p in x.attrib["points"].split()] for x in root.iter(f"{SVG}polyline")]
    return lines, [t.text or "" for t in root.iter(f"{SVG}text")]  # type: ignore[return-value]


def test_a_curve_over_the_place_in_the_run() -> None:
    bins = [(1, 10, 1.0, 0.0), (11, 20, 1.0, 0.5), (21, 30, None, 0.5), (31, 40, 1.0, 1.0)]
    lines, texts = drawn(record("a", bins))
    then, now, *_ = lines
    assert len(then) == 3 and len(now) == 4, "what is not known is left out"
    assert {y for _, y in then} == {50.0}, "100 % is the top"
    assert [y for _, y in now] == [190.0, 120.0, 120.0, 50.0]
    left, right = 410.0, 694.0  # the second panel's ends
    assert [x for x, _ in now] == [pytest.approx(left + (right - left) * m / 40, abs=0.1) for m in (5, 15, 25, 35)]
    assert {"hold right after their batch, %", "hold at the end of the run, %", "newest of 40 facts", "oldest"} <= {
        *texts
    }
    seeds = [record("a", [(1, 20, 1.0, x), (21, 40, 1.0, 1.0)], seed=i) for i, x in enumerate((0.0, 0.5))]
    assert drawn(*seeds)[0][1][0][1] == pytest.approx(155.0), "seeds are averaged: 25 %"
    assert svg_retention([record("a", [])]) is None is svg_retention([{"status": "failed"}])
    stopped = drawn(record("a", bins[:2]), record("b", bins))[0]
    assert stopped[0][-1][0] < 410 and "newest of 40 facts" in drawn(record("a", bins[:2]))[1], (
        "its own end is not the run's"
    )


def test_a_bench_of_batches_has_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Facts that the guard takes back are not of the run; a run of one batch, or a small one, has no cohorts."""
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "model")
    rows = [
        {"prompt": f"I met {chr(65 + i % 26)}{i} Tomas", "subject": "Tomas", "target_new": "and",
         "locality": {"neighborhood": [{"prompt": "The old house", "answer": "stood"}]}}
        for i in range(33)
    ]  # fmt: skip
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "corpus.txt").write_text(CORPUS)
    easy = ["preserve=0.0001", "prefixes=0", "optimizer=adam", "steps=3", "wordings=0", "guard=1"]
    config = {
        "models": ["model"], "datasets": [{"name": "pico", "facts": "facts.jsonl"}], "corpus": "corpus.txt",
        "text": "corpus.txt", "layers": "1", "methods": [{"name": "memit", "set": easy, "label": "x", "rounds": 1}],
        "runs": [{"edits": 33, "batch_size": 11}, {"edits": 33}, {"edits": 4, "batch_size": 2}],
    }  # fmt: skip
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: "")
    out = tmp_path / "out"
    assert run("bench", tmp_path / "b.yaml", "-o", out, "--json") == 0
    whole, one, small = json.loads(capsys.readouterr().out)["cells"]
    assert [c["name"] for c in whole["cohorts"]] == ["oldest", "middle", "newest"]
    assert [(b["first"], b["last"]) for b in whole["retention"]] == [(1, 10), (11, 20), (21, 30), (31, 33)]
    assert whole["cohorts"][0]["parts"][0]["group"] == "neighborhood" and whole["cohorts"][2]["last"] == 33
    assert one["cohorts"] == one["retention"] == small["cohorts"] == small["retention"] == []
    text = (out / "tables.md").read_text()
    assert (
        text.count("oldest, middle and newest facts kept") == 1 and "| oldest 1-10 |" in text and "![retention]" in text
    )
    assert "neighbours (QA)" in text and "Kept: of the facts that held right after" in text
    assert (out / "retention.svg").exists()
    config["runs"] = config["runs"][1:]  # type: ignore[index]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    assert run("bench", tmp_path / "b.yaml", "-o", out, "--report-only") == 0
    assert not (out / "retention.svg").exists(), "one of an earlier configuration does not stay"
    assert "oldest, middle" not in (out / "tables.md").read_text()
    verdicts = iter(["", "harm"])
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: next(verdicts))
    config["runs"] = [{"edits": 33, "batch_size": 31}]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert run("bench", tmp_path / "b.yaml", "-o", out, "--json") == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["stopped"] and [c["last"] for c in cell["cohorts"]] == [10, 20, 31], "two were taken back"


def test_seeds_are_averaged_and_cohorts_found_by_name() -> None:
    def cell(key: str, seed: int) -> Any:
        return type("C", (), {
            "key": key, "run": RunKind(40, 10), "model": "m", "label": "x", "seed": seed,
            "dataset": type("D", (), {"name": "d"})(),
        })()  # fmt: skip

    def share(v: float) -> dict[str, Any]:
        return {"value": v, "low": v, "high": v, "units": 10}

    def told(name: str, last: int, v: float, parts: Any = ()) -> dict[str, Any]:
        return {"name": name, "first": last - 9, "last": last, "right_after": share(1.0), "after": share(v), "kept": None,
                "parts": [*parts]}  # fmt: skip

    near = {"metric": "locality", "group": "neighborhood", "own": False, "after": share(0.5)}
    base = {
        "status": "done", "reason": "", "scores": {}, "harmonic": 0.5, "drift": {}, "seconds": {}, "kept": None,
        "text_loss": {}, "perplexity": {}, "model": "m", "dataset": "d", "label": "x", "edits": 40, "batch_size": 10,
    }  # fmt: skip
    found = {
        "a": {**base, "seed": 0, "cohorts": [told("oldest", 10, 0.0, [near]), told("newest", 40, 1.0)]},
        "b": {**base, "seed": 1, "cohorts": [told("oldest", 10, 1.0, [near]), told("newest", 30, 1.0)]},
    }
    *_, grid = tables([cell("a", 0), cell("b", 1)], found)
    assert grid.columns == (
        "model",
        "dataset",
        "method",
        "facts",
        ">right after",
        ">at the end",
        ">kept",
        ">neighbours (QA)",
    )
    oldest, newest = grid.rows
    assert (
        oldest[3] == "oldest 1-10"
        and oldest[4:5] == ("100.0",)
        and oldest[5].startswith("50.0 ±")
        and oldest[7] == "50.0"
    )
    assert newest[3] == "newest 31-40, 21-30" and newest[6:] == ("–", "–"), "the guard ended one of them early"
    without = tables([cell("a", 0)], {"a": {k: v for k, v in found["a"].items() if k != "cohorts"}})
    assert len(without) == 2, "results of before have none"
