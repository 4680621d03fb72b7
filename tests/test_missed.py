"""Facts that did not take, beside the patch: what is written is read again as it was, and no file of the user's is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mosectl.editing.missed import beside
from mosectl.errors import OutputError
from mosectl.facts.records import Fact, Probe, fact_from_dict, read_facts
from mosectl.facts.writer import lines, row_of, unchanged
from support.commands import World, run
from support.facts import FACTS
from support.field_files import ROWS, write

FULL = Fact(
    "The {} of a{}b is", "a{}b", "中国", "the \u2028old\none", ("Say {}, a{}b and {}",),
    (Probe("x", "y", "neighborhood", ("z", "w")), Probe("x", "y", "same_subject"), Probe("no answer"), Probe("x", "y", "O")),
    (Probe("hop", "end", "multi_hop", needs=(Probe("{} of", "b", "", ("c",)), Probe("d", "e"))),), "here", False,
    ("Cina", "PRC"),
)  # fmt: skip


def plain(facts: Any) -> list[Fact]:
    return [replace(f, source="") for f in facts]


def read(data: bytes, folder: Path) -> tuple[list[Fact], Any]:
    (folder / "again.jsonl").write_bytes(data)
    report = read_facts(folder / "again.jsonl")
    return plain(report.facts), report


@pytest.mark.parametrize("name", ["own", *ROWS])
def test_facts_of_every_shape_are_read_again_as_they_were(name: str, tmp_path: Path) -> None:
    given = [fact_from_dict(f, "x") for f in FACTS]
    if name != "own":
        given = [*read_facts(write(name, tmp_path)).facts]
    found, report = read(lines((f, "not reached") for f in given), tmp_path)
    assert found == plain(given) and not report.skipped
    assert [p for p in report.problems if "not used" in p.what or "unknown" in p.what] == [], "nor is the mark told of"


def test_braces_line_breaks_and_groups_stay(tmp_path: Path) -> None:
    fact = replace(
        FULL, prompt="The a{}b of a{}b is", rephrase_prompts=("Say a{}b, a{}b and a{}b",), ground_truth="old"
    )
    assert read(lines([(fact, "not reached")]), tmp_path)[0] == plain([fact])
    assert row_of(fact)["prompt"] == "The {} of {} is" and row_of(replace(fact, subject="b"))["subject"] == "b"
    assert row_of(Fact("p", "p", "t")) == {"prompt": "p", "subject": "p", "target_new": "t"}
    odd = Fact("We\u2028went to\nOz", "Oz", "in", locality=(Probe("a\nb", "c"),))
    assert read(lines([(odd, "x")]), tmp_path)[0] == plain([odd])


def test_a_file_that_somebody_has_changed_is_known() -> None:
    data = lines((fact_from_dict(f, "x"), "not reached") for f in FACTS)
    first, second = data.splitlines(keepends=True)
    assert unchanged(data) and unchanged(second) and unchanged(data.replace(b"\n", b"\n\n"))
    row = json.loads(first)
    for other in (
        b"",
        b"\n",
        first.replace(b'"and"', b'"or"') + second,
        data.replace(b"not reached", b"not edited", 1),
        data + b'{"prompt": "I met Oz", "subject": "Oz", "target_new": "x"}\n',
        data[:-20],
        b"[]\n",
        json.dumps({**row, "note": "mine"}).encode(),
        json.dumps({**row, "missed": True}).encode(),
        b"precious",
        b"\xff",
    ):
        assert not unchanged(other), other


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two facts that a pico model can be made to say, and one that it cannot."""
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))
    world = World(tmp_path)
    world.facts.write_text("\n".join(map(json.dumps, [*FACTS, HARD])))
    return world


HARD = {
    "prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "zq Zq zQ qz QZ",
    "rephrase_prompts": ["We saw Brinmouth"], "locality": {"neighborhood": [{"prompt": "The old house", "answer": "stood"}]},
}  # fmt: skip
QUICK = ("--set", "wordings=0", "--set", "optimizer=adam")


def test_they_are_written_beside_the_patch_and_taken_away_when_none_is_left(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = world.folder / "new.safetensors.missed.jsonl"
    assert missed == beside(world.folder / "new.safetensors")
    assert run(*world.edit(*QUICK)) == 0
    out, err = capsys.readouterr()
    assert f"1 fact that did not take → {missed}" in out
    assert f"mosectl edit {missed} --model edited/" in " ".join(err.split())
    wanted = [f for f in read_facts(world.facts).facts if f.subject == "Brinmouth"]
    assert plain(read_facts(missed).facts) == plain(wanted) and wanted[0].locality[0].group == "neighborhood"
    assert json.loads(missed.read_text())["missed"]["status"] == "not reached"
    assert run("check", missed) == 0
    more = ("edit", missed, "--model", world.model, "-o", world.folder / "more.safetensors", "--dry-run")
    assert run(*more) == 0
    capsys.readouterr()
    assert run(*world.edit(*QUICK, "--overwrite", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["missed"] == str(missed)
    assert run(*world.edit(*QUICK, "--overwrite", "--limit", 2, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["missed"] is None and not missed.exists(), "it would no longer be true"


def test_facts_that_the_guard_took_back_are_among_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter(["", "ordinary text became less likely"])
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: next(verdicts))
    assert run(*world.edit(*QUICK, "--batch-size", 1)) == 11
    told = [json.loads(line) for line in beside(world.folder / "new.safetensors").read_text().splitlines()]
    assert [(t["subject"], t["missed"]["status"]) for t in told] == [
        ("Avaland", "not edited"),
        ("Brinmouth", "not edited"),
    ]


@pytest.mark.parametrize("theirs", ["precious", "edited"])
def test_a_file_that_is_not_ours_is_kept(
    theirs: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = beside(world.folder / "new.safetensors")
    if theirs == "edited":
        row = json.loads(lines([(fact_from_dict(HARD, "x"), "not reached")]))
        missed.write_text(json.dumps({**row, "target_new": "in"}))
    else:
        missed.write_text(theirs)
    before = world.state()
    with monkeypatch.context() as m:
        m.setattr("mosectl.editing.edit.edit", lambda *_, **__: pytest.fail("told after the work"))
        assert run(*world.edit(*QUICK)) == 7
    err = " ".join(capsys.readouterr().err.split())
    assert "is not as mosectl edit wrote it" in err and "--overwrite" in err and world.state() == before
    assert run(*world.edit(*QUICK, "--limit", 1)) == 0, "one fact has no such file"
    assert world.state() | before == world.state()
    assert run(*world.edit(*QUICK, "--limit", 2, "--overwrite")) == 0
    assert world.state() | before == world.state(), "what is not ours is not taken away"
    assert run(*world.edit(*QUICK, "--overwrite")) == 0 and unchanged(missed.read_bytes())


def test_what_the_edit_reads_is_neither_replaced_nor_taken_away(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*world.edit(*QUICK)) == 0
    missed = beside(world.folder / "new.safetensors")
    both = lines((f, "not reached") for f in read_facts(world.facts).facts)
    for data in (missed.read_bytes(), both):
        missed.write_bytes(data)
        args = ("edit", missed, "--model", world.model, "-o", world.folder / "new.safetensors", "--overwrite")
        assert run(*args) == 7 and "it would be lost" in capsys.readouterr().err
        assert missed.read_bytes() == data


def test_something_that_is_no_file_is_told_before_the_work(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    beside(world.folder / "new.safetensors").mkdir()
    assert run(*world.edit(*QUICK)) == 7 and run(*world.edit(*QUICK, "--overwrite")) == 7
    assert "is not a regular file" in capsys.readouterr().err
    from mosectl.editing.missed import check_missed

    with pytest.raises(OutputError, match="name too long"):
        check_missed(world.folder / ("x" * 250), 2, overwrite=False, reads=())
    check_missed(world.folder / ("x" * 250), 1, overwrite=False, reads=())
