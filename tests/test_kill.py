"""SIGKILL at random instants: a folder is wholly old or wholly new, and the next run succeeds."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save
from test_stack import hashes, patch_for

from mosectl import rebuild
from mosectl.errors import OutputError
from mosectl.stack import apply, revert

KILLS = int(os.environ.get("MOSECTL_KILLS", "6"))  # of each of apply, revert and merge


@pytest.mark.timeout(600)
def test_killed_at_random_instants(tmp_path: Path) -> None:
    base = save(tmp_path / "base", dtype=torch.bfloat16, shard="20KB")
    for name, seed in (("a", 1), ("b", 2)):
        patch_for(base, (0, 1, 2), seed=seed).save(tmp_path / f"{name}.safetensors")
    (tmp_path / "base" / "README.md").write_text("x")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed.py"), str(tmp_path), str(KILLS)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])["seen"]
    assert all(sum(counts.values()) == KILLS for counts in seen.values())
    assert seen["apply"]["old"] and seen["revert"]["old"], seen


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
        mark = rebuild._mark

        def stop(folder: Path, shard: str, tensors: object) -> None:
            mark(folder, shard, tensors)  # type: ignore[arg-type]
            marks.append(shard)
            if len(marks) == 2:
                raise Killed

        with monkeypatch.context() as m:
            m.setattr(rebuild, "_mark", stop)
            m.setattr("mosectl.files.shutil.rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
            with pytest.raises(Killed):
                apply([made_by], base, tmp_path / "out")  # type: ignore[list-item]
        cloned: list[str] = []
        clone = rebuild.clone
        monkeypatch.setattr(rebuild, "clone", lambda a, b: (cloned.append(b.name), clone(a, b))[1])
        done = apply([patch], base, tmp_path / "out")
        monkeypatch.setattr(rebuild, "clone", clone)
        assert hashes(tmp_path / "out") == hashes(tmp_path / "whole") and not list(tmp_path.glob(".out*"))
        assert not list((tmp_path / "out").glob(".mosectl*"))
        assert revert(patch, tmp_path / "out", tmp_path / "back").restored and hashes(tmp_path / "back") == hashes(base)
        for folder in ("out", "back"):
            subprocess.run(["rm", "-r", str(tmp_path / folder)], check=True)
        notes = [t.note for t in done.tensors]
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
