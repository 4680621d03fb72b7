"""An interrupted edit goes on after its last batch, to the very same patch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save
from safetensors import safe_open
from safetensors.torch import save_file
from test_editor import CORPUS, FACTS, FEW

import mosectl
from mosectl.cli import main
from mosectl.errors import OutputError
from mosectl.facts import fact_from_dict
from mosectl.progress import Progress, beside
from mosectl.run import Run

THIRD = {"prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "of"}
ALL = [fact_from_dict(f, "x") for f in [*FACTS, THIRD]]


@pytest.fixture
def options(tmp_path: Path) -> Any:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return replace(FEW, corpus=str(tmp_path / "corpus.txt"), batch_size=1, rehearse=5.0, protect=50.0)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C in the middle of batch ``at``, after its weights were set."""
    real, calls = Run._batch, []

    def batch(run: Run, *args: Any) -> Any:
        calls.append(1)
        done = real(run, *args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Run, "_batch", batch)


@pytest.mark.parametrize("at", [2, 3])
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
    with safe_open(kept.path, framework="pt") as file:
        record = json.loads(file.metadata()["mosectl-progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert len(record["losses"]) == at - 1
    record["failures"] = [
        f + 2 for f in record["failures"]
    ]  # given up: not edited again, which another record would tell
    save_file(tensors, tmp_path / "given-up", {"mosectl-progress": json.dumps(record)})
    batches: list[int] = []
    failures: list[list[int]] = []
    real = Run._batch

    def counted(run: Run, *a: Any) -> Any:
        batches.append(a[2])
        failures.append(list(run.earlier.failures))
        return real(run, *a)

    monkeypatch.setattr(Run, "_batch", counted)
    again = mosectl.edit(ALL, folder, options=options, progress=kept, refuse=False)
    assert batches == list(range(at - 1, 3)), "finished batches are not done again"
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
    kept.path.write_bytes(b"x" + kept.path.read_bytes()[1:])
    with pytest.raises(OutputError, match="damaged"):
        mosectl.edit(ALL, folder, options=options, progress=kept)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, out, facts = save(tmp_path / "m"), tmp_path / "p.safetensors", tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(f) + "\n" for f in [*FACTS, THIRD]))
    (tmp_path / "corpus.txt").write_text(CORPUS)

    def edit(*more: str) -> int:
        sets = ["preserve=0.0001", "step_size=0.3", "fisher=0", "margin=3", "decay=0", "kl_weight=0", "prefixes=0"]
        how = ["--layers", "0,1,2", "--batch-size", "1", "--corpus", str(tmp_path / "corpus.txt")]
        command = ["mosectl", "edit", str(facts), "--model", str(folder), "-o", str(out), *how]
        monkeypatch.setattr("sys.argv", [*command, *(x for s in sets for x in ("--set", s)), *more])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code

    with monkeypatch.context() as m:
        interrupted(m, 3)
        assert edit() == 130
    assert "--resume" in capsys.readouterr().err and not out.exists() and beside(out).exists()
    assert edit() == 7 and "interrupted run" in capsys.readouterr().err, "what was reached is not thrown away"
    assert edit("--resume") == 0 and out.exists() and not beside(out).exists()
    resumed = mosectl.Patch.load(out).id
    assert edit("--overwrite") == 0 and mosectl.Patch.load(out).id == resumed
    out.unlink()
    assert edit("--resume") == 0, "with nothing to resume it begins at the beginning"
