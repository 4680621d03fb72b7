"""An interrupted edit goes on after its last batch, to the very same patch."""

from __future__ import annotations

import io
import json
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from hypothesis import given
from hypothesis import strategies as st

import mosectl
from mosectl.cli.main import main
from mosectl.cli.params import Interrupted, resumable
from mosectl.editing.resume import KIND, RECORD, Progress, beside
from mosectl.editing.session import SLIPPED, Session
from mosectl.errors import OutputError
from mosectl.facts.records import fact_from_dict
from mosectl.render import console
from mosectl.storage.progress import Clock
from mosectl.storage.state_file import read_state, write_state
from support.facts import CORPUS, FACTS, FEW
from support.json_mutations import fuzzing
from support.models import save
from support.spoiling import flipped, mutated

THIRD = {"prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "of"}
ALL = [fact_from_dict(f, "x") for f in [*FACTS, THIRD]]


@pytest.fixture
def options(tmp_path: Path) -> Any:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return replace(FEW, corpus=str(tmp_path / "corpus.txt"), batch_size=1, replay_margin=5.0, previous_edit_weight=50.0)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C in the middle of batch ``at``, after its weights were set."""
    real, calls = Session._batch, []

    def batch(run: Session, *args: Any) -> Any:
        calls.append(1)
        done = real(run, *args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Session, "_batch", batch)


def test_every_phase_of_an_edit_has_its_total_from_the_start_and_an_end(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))  # another test may have kept these statistics
    told: dict[str, list[tuple[int, int]]] = {}
    how = replace(options, wordings=1, rounds=7)
    on_step = lambda phase, *at: told.setdefault(phase, []).append(at)  # noqa: E731
    mosectl.edit(ALL, save(tmp_path / "m"), options=how, refuse=False, on_step=on_step)
    assert {phase: steps[-1] for phase, steps in told.items() if steps[-1][0] != steps[-1][1]} == {}
    assert {total for _, total in told["targets"]} == {len(ALL) * 7} and told["targets"][0][0] == 0
    done = [n for n, _ in told["targets"]]
    assert done == sorted(done), "it does not begin anew in each part"
    assert told["wordings"][0] == (0, len(ALL)) and told["wordings"][-1] == (len(ALL), len(ALL))
    assert any(n == 0 and total > 1 for n, total in told["statistics"]), "the plan is told before the first batch"


def test_a_phase_that_fails_is_not_told_as_finished() -> None:
    told: list[tuple[str, int, int]] = []
    clock = Clock(lambda *at: told.append(at))
    with pytest.raises(ValueError), clock("a", 5) as step:
        step(2, 5)
        raise ValueError
    with clock("b", in_parts=True) as step:
        step(1, 4)
    with clock("b", in_parts=True) as step:
        step(2, 4)
    assert told == [("a", 0, 5), ("a", 2, 5), ("b", 0, 1), ("b", 1, 4), ("b", 2, 4)] and clock.seconds["a"] > 0
    clock.ended("b")
    clock.ended("b")
    clock.ended("never begun")
    assert told[5:] == [("b", 4, 4)]


def test_a_bars_clock_runs_while_its_phase_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now, bars = [0.0], []

    class Shown(console.Bars):
        def __init__(self, *columns: Any, **how: Any) -> None:
            super().__init__(*columns, **how, get_time=lambda: now[0], auto_refresh=False)
            bars.append(self)

    monkeypatch.setattr(console, "Bars", Shown)
    monkeypatch.setattr(console, "_err", lambda: rich.console.Console(file=io.StringIO(), force_terminal=True))
    with console.progress() as step:
        for at, phase, done, total in (
            *((0, "targets", 0, 6), (2, "targets", 2, 6), (2, "solve", 0, 1), (12, "solve", 1, 1)),
            *((13, "targets", 2, 6), (15, "targets", 4, 6), (15, "solve", 0, 1), (16, "solve", 1, 1)),
            *((17, "targets", 6, 6), (18, "guard", 0, 1), (30, "guard", 0, 1)),
        ):
            now[0] = at
            step(phase, done, total)
        targets, solve, guard = bars[0].tasks
    # A phase lasts until another one begins: the second solve from 15 to 17.
    assert (targets.finished_time, targets.elapsed) == (4, 5) and targets.finished
    assert (solve.finished_time, solve.elapsed) == (12, 13) and guard.elapsed == 12 and not guard.finished


def test_a_note_stands_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as step:
        stream = sys.stderr.rich_proxied_file  # type: ignore[attr-defined]
        step("targets", 1, 6)
        console.warn("note", ": it is odd")
        console.hint("a hint")
    written = stream.getvalue()
    for said in ("note", "a hint"):
        line = re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", written[: written.index(said)].rpartition("\x1b[2K")[2])
        assert "targets" not in line, "it is not glued to the bar"
    assert "targets" in written
    console.hint("later")
    assert sys.stderr.getvalue().endswith("later\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [2, 3, 4])  # the fourth: facts that have slipped by the end
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_same_patch(
    model_type: str, at: int, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = save(tmp_path / "m", model_type), Progress(tmp_path / "p.progress", resume=True)
    whole = mosectl.edit(ALL, folder, options=options, refuse=False)
    with monkeypatch.context() as m:
        interrupted(m, at)
        with pytest.raises(KeyboardInterrupt):
            mosectl.edit(ALL, folder, options=options, progress=kept, refuse=False)
    record, tensors = read_state(kept.path, KIND, RECORD, "", 10**9)
    assert len(record["losses"]) == at - 1
    record["failures"] = [
        f + 2 for f in record["failures"]
    ]  # given up: not edited again, which another record would tell
    write_state(tmp_path / "given-up", KIND, record, tensors)
    batches: list[int] = []
    failures: list[list[int]] = []
    real = Session._batch

    def counted(run: Session, *a: Any) -> Any:
        if SLIPPED not in a:
            batches.append(a[2])
            failures.append(list(run.layers.earlier.failures))
        return real(run, *a)

    monkeypatch.setattr(Session, "_batch", counted)
    again = mosectl.edit(ALL, folder, options=options, progress=kept, refuse=False)
    assert batches == list(range(at - 1, 3)), "finished batches are not done again"
    if failures:
        mosectl.edit(ALL, folder, options=options, progress=Progress(tmp_path / "given-up", resume=True), refuse=False)
        assert failures[4 - at] == [f + 2 for f in failures[0]], "what has been given up stays so"
    assert again.patch.id == whole.patch.id and again.curve == whole.curve
    assert [f.loss for f in again.facts] == [f.loss for f in whole.facts]


def test_another_run_is_not_continued(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = save(tmp_path / "m"), Progress(tmp_path / "p.progress", resume=True)
    with monkeypatch.context() as m:
        interrupted(m, 2)
        with pytest.raises(KeyboardInterrupt):
            mosectl.edit(ALL, folder, options=options, progress=kept)
    other = save(tmp_path / "other", vocab_size=400)
    moved = [*ALL[:2], replace(ALL[2], target_new="in")]
    for what, facts, model, how in [
        ("facts", moved, folder, options),
        ("settings", ALL, folder, replace(options, seed=1)),
        ("weights", ALL, other, options),
    ]:
        with pytest.raises(OutputError, match=f"other {what}") as e:
            mosectl.edit(facts, model, options=how, progress=kept)
        assert "--overwrite" in e.value.fix and kept.path.exists()
    fresh = mosectl.edit(ALL, folder, options=options, progress=replace(kept, resume=False), refuse=False)
    assert fresh.patch.id == mosectl.edit(ALL, folder, options=options, refuse=False).patch.id
    data = kept.path.read_bytes()
    kept.path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(OutputError, match="damaged"):
        mosectl.edit(ALL, folder, options=options, progress=kept)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, tuple[int, int]]]:
    """The state of an interrupted run, what it belongs to, and the shapes of the edited weights."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "corpus.txt").write_text(CORPUS)
    how = replace(FEW, corpus=str(folder / "corpus.txt"), batch_size=1, previous_edit_weight=50.0)
    kept, taken = Progress(folder / "p.progress", resume=True), []

    def load(_: Progress, *given: Any) -> Any:
        taken.extend(given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setenv("MOSECTL_CACHE", str(folder / "cache"))
        save(folder / "m")
        interrupted(m, 3)
        with pytest.raises(KeyboardInterrupt):
            mosectl.edit(ALL, folder / "m", options=how, progress=kept, refuse=False)
        m.setattr(Progress, "load", load)
        with pytest.raises(KeyboardInterrupt):
            mosectl.edit(ALL, folder / "m", options=how, progress=kept, refuse=False)
    return kept.path, taken[0], taken[1]


def test_a_flipped_bit_and_missing_losses(begun: Any) -> None:
    path, ours, shapes = begun
    assert len(Progress(path, resume=True).load(ours, shapes, 3).losses) == 2
    record, tensors = read_state(path, KIND, RECORD, "", 10**9)
    other, data = path.with_name("other"), bytearray(path.read_bytes())
    data[-1] ^= 1  # in a weight
    other.write_bytes(data)
    with pytest.raises(OutputError, match=r"checksum(.|\n)*--overwrite"):
        Progress(other, resume=True).load(ours, shapes, 3)
    for changes, what in (
        ({"losses": None}, "losses: must be a list"),
        ({"losses": [1.0]}, "1 losses of 3 facts"),
        ({"curve": record["curve"][:-1]}, "a curve of other"),
        ({"failures": [0, "x"]}, r"failures\[1\]: must be a whole number"),
    ):
        write_state(other, KIND, record | changes, tensors)
        with pytest.raises(OutputError, match=what):
            Progress(other, resume=True).load(ours, shapes, 3)
    name = next(n for n in tensors if n.startswith("V."))
    write_state(other, KIND, record, tensors | {name: tensors[name][:, 1:]})
    with pytest.raises(OutputError, match="tensors of other shapes"):
        Progress(other, resume=True).load(ours, shapes, 3)
    other.unlink()
    os.mkfifo(other)
    with pytest.raises(OutputError, match="not a regular file"):
        Progress(other, resume=True).load(ours, shapes, 3)


@pytest.mark.slow
@fuzzing
@given(st.integers(0, 2**32))
def test_damaged_progress(begun: Any, seed: int) -> None:
    chance, (path, ours, shapes) = random.Random(seed), begun
    other = path.with_name("fuzzed")
    if chance.random() < 0.3:
        other.write_bytes(flipped(path.read_bytes(), chance))
    else:
        record, tensors = read_state(path, KIND, RECORD, "", 10**9)
        if chance.random() < 0.3:
            name = chance.choice(list(tensors))
            tensors[name] = chance.choice([torch.zeros(3), tensors[name].flatten()[:1], tensors[name][None]])
        write_state(other, KIND, mutated(record, chance), tensors)
    try:
        assert len(Progress(other, resume=True).load(ours, shapes, 3).losses) == 2
    except OutputError as e:
        assert "--overwrite" in e.fix and str(other) in str(e)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, out, facts = save(tmp_path / "m"), tmp_path / "p.safetensors", tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(f) + "\n" for f in [*FACTS, THIRD]))
    (tmp_path / "corpus.txt").write_text(CORPUS)

    def edit(*more: str) -> int:
        sets = [
            "preserve=0.0001",
            "step_size=0.3",
            "optimizer=adam",
            "margin=3",
            "decay=0",
            "kl_weight=0",
            "prefixes=0",
        ]
        how = ["--layers", "0,1,2", "--batch-size", "1", "--corpus", str(tmp_path / "corpus.txt")]
        command = ["mosectl", "edit", str(facts), "--model", str(folder), "-o", str(out), *how]
        monkeypatch.setattr("sys.argv", [*command, *(x for s in sets for x in ("--set", s)), *more])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code

    with monkeypatch.context() as m:
        interrupted(m, 3)
        assert edit() == 130
    told = capsys.readouterr().err
    assert f"interrupted: {beside(out)} holds the finished batches\n  → give --resume to go on\n" in told
    assert "nothing half-written" not in told and not out.exists() and beside(out).exists()
    assert edit() == 7 and "interrupted run" in capsys.readouterr().err, "what was reached is not thrown away"
    assert edit("--resume") == 0 and out.exists() and not beside(out).exists()
    resumed = mosectl.Patch.load(out).id
    assert edit("--overwrite") == 0 and mosectl.Patch.load(out).id == resumed
    out.unlink()
    capsys.readouterr()
    assert edit("--resume") == 0, "with nothing to resume it begins at the beginning"
    assert "to go on with: begun at the beginning" in capsys.readouterr().err


def test_ctrl_c_tells_of_this_runs_work_alone(tmp_path: Path) -> None:
    state = tmp_path / "p.progress"

    def pressed(write: str = "", *, resume: bool = False) -> BaseException:
        with pytest.raises((KeyboardInterrupt, Interrupted)) as e, resumable(state, "x", "y", resume=resume):
            if write:
                state.write_text(write)
                os.utime(state, ns=(0, len(write)))
            raise KeyboardInterrupt
        return e.value

    assert isinstance(pressed(), KeyboardInterrupt), "nothing was finished"
    assert isinstance(pressed("ours"), Interrupted)
    assert isinstance(pressed(), KeyboardInterrupt), "what lies there is of another run"
    assert isinstance(pressed("of ours"), Interrupted) and isinstance(pressed(resume=True), Interrupted)
