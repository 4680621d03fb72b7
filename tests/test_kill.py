"""SIGKILL at random instants: a folder is wholly old or wholly new, and the next run succeeds."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.checkpoints import writer
from mosectl.checkpoints.apply import apply, revert
from mosectl.errors import OutputError
from support.editors import rows
from support.facts import CORPUS, FACTS
from support.models import save
from support.patches import hashes, patch_for
from support.paths import ROOT

KILLS = int(os.environ.get("MOSECTL_KILLS", "4"))  # of each job; 60 in the slow run
JOBS = {"apply", "revert", "merge", "lora", "gguf", "merged", "edit", "train", "bench"}


def child(folder: Path, *args: object) -> dict[str, Any]:
    """What killed.py has seen in a folder with a model, two patches, facts and a bench."""
    pytest.importorskip("gguf")
    base = save(folder / "base", dtype=torch.bfloat16, shard="20KB")
    for name, seed in (("a", 1), ("b", 2)):
        patch_for(base, (0, 1, 2), seed=seed).save(folder / f"{name}.safetensors")
    (base / "README.md").write_text("x")
    (folder / "corpus.txt").write_text(CORPUS)
    (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    (folder / "more.jsonl").write_text(rows(9))
    method = {"name": "memit", "layers": "0,1", "set": ["prefixes=0", "preserve=0.0001"]}
    bench = {
        "models": [str(base)], "datasets": [{"facts": "facts.jsonl"}], "corpus": "corpus.txt", "text": "corpus.txt",
        "runs": [{"edits": 1}], "seeds": [0, 1], "methods": [method],
    }  # fmt: skip
    (folder / "bench.yaml").write_text(json.dumps(bench))  # which is YAML too
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "killed.py"), str(folder), *map(str, args)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(60 + 150 * KILLS)
def test_killed_at_random_instants_and_calls(tmp_path: Path) -> None:
    seen = child(tmp_path, "kill", KILLS)
    assert seen.keys() == JOBS
    assert all(counts["old"] + counts["new"] >= KILLS // 2 and counts["rerun"] for counts in seen.values()), seen
    assert seen["apply"]["old"] and seen["revert"]["old"], seen


@pytest.mark.timeout(600)
def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    seen = child(tmp_path, "race", max(2, KILLS // 2))
    assert seen.keys() == {"merge", "apply", "revert", "edit"}


def test_an_interrupted_start_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process leaves: shards written by the same plan are not written again; another plan's are deleted."""
    base = save(tmp_path / "base", shard="20KB")
    patch, other = patch_for(base, (0, 1, 2)), patch_for(base, (0, 1, 2), seed=9)
    apply([patch], base, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def left_behind(made_by: object) -> int:
        """Apply, killed before the second shard's mark; returns how many shards a second start clones."""
        marks: list[str] = []
        mark = writer._mark

        def stop(folder: Path, shard: str, tensors: object) -> None:
            mark(folder, shard, tensors)  # type: ignore[arg-type]
            marks.append(shard)
            if len(marks) == 2:
                raise Killed

        with monkeypatch.context() as m:
            m.setattr(writer, "_mark", stop)
            m.setattr("mosectl.storage.folders.remove", lambda *_: None)  # a killed process cleans nothing up
            with pytest.raises(Killed):
                apply([made_by], base, tmp_path / "out")  # type: ignore[list-item]
        cloned: list[str] = []
        clone = writer.clone
        monkeypatch.setattr(writer, "clone", lambda a, b: (cloned.append(b.name), clone(a, b))[1])
        done = apply([patch], base, tmp_path / "out")
        monkeypatch.setattr(writer, "clone", clone)
        assert hashes(tmp_path / "out") == hashes(tmp_path / "whole") and not list(tmp_path.glob(".out*"))
        assert not list((tmp_path / "out").glob(".mosectl*"))
        assert revert(patch, tmp_path / "out", tmp_path / "back").restored and hashes(tmp_path / "back") == hashes(base)
        for folder in ("out", "back"):
            subprocess.run(["rm", "-r", str(tmp_path / folder)], check=True)
        notes, cloned = [t.note for t in done.tensors], [n for n in cloned if n.endswith(".safetensors")]
        assert notes.count("written by the start before") == len(notes) - len(cloned)
        return len(cloned)

    assert left_behind(patch) == 1, "two of three shards were there"
    assert left_behind(other) == 3, "another patch's shards are no use"


def test_a_second_process_is_locked_out(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    with (tmp_path / ".out.mosectl.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another mosectl process is writing there"):
            apply([patch], base, tmp_path / "out")
    apply([patch], base, tmp_path / "out")
    assert not (tmp_path / ".out.mosectl.lock").exists()


def test_copies_and_links(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    patch = patch_for(base, (0,))
    apply([patch], base, tmp_path / "linked")
    apply([patch], base, tmp_path / "copied", copy=True)
    assert any(f.stat().st_nlink > 1 for f in (tmp_path / "linked").glob("*.safetensors"))
    assert all(f.stat().st_nlink == 1 for f in (tmp_path / "copied").glob("*.safetensors"))
    assert hashes(tmp_path / "linked") == hashes(tmp_path / "copied")


def test_the_proof_can_be_had_or_left_out(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    for i, proof in enumerate((None, True, False)):
        done = apply([patch], base, tmp_path / str(i), proof=proof)
        assert all((t.stability is None) == (proof is False) for t in done.tensors)
