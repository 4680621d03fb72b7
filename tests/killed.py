"""Run by test_kill.py in an interpreter of its own: jobs in forked children, killed at random instants, then looked at.

Usage: killed.py FOLDER KILLS. Nothing of torch runs in the parent, whose threads a fork would not take along.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mosectl.compose import merge
from mosectl.patch import Patch
from mosectl.stack import apply, revert

FOLDER, KILLS = Path(sys.argv[1]), int(sys.argv[2])
BASE, FIRST, SECOND = FOLDER / "base", FOLDER / "a.safetensors", FOLDER / "b.safetensors"
OUT, MERGED = FOLDER / "out", FOLDER / "m.safetensors"


def forked(job: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return child


def finished(job: Callable[[], object]) -> None:
    _, status = os.waitpid(forked(job), 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{job} failed"


def content(path: Path) -> str:
    """A digest of a file, or of all files of a folder; "" where there is none."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(FOLDER)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def do_apply() -> None:
    apply([Patch.load(FIRST), Patch.load(SECOND)], BASE, OUT)


def do_revert() -> None:
    revert(Patch.load(FIRST), OUT)


def do_merge() -> None:
    merge([Patch.load(FIRST), Patch.load(SECOND)]).save(MERGED)


def gone(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def again(name: str) -> None:
    """Back to where the job starts from."""
    if name == "merge":
        gone(MERGED)
    elif name == "apply":
        gone(OUT)
    else:
        gone(OUT)
        finished(do_apply)


def main() -> None:
    chance, seen, base = random.Random(0), {}, content(BASE)
    for name, job, target in (("apply", do_apply, OUT), ("revert", do_revert, OUT), ("merge", do_merge, MERGED)):
        again(name)
        old = content(target)
        start = time.perf_counter()
        finished(job)
        took, new = time.perf_counter() - start, content(target)
        assert old != new
        again(name)
        counts = {"old": 0, "new": 0}
        for _ in range(KILLS):
            child = forked(job)
            time.sleep(chance.uniform(0, 1.1 * took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = content(target)
            assert found in (old, new), f"{name}: half-written after a kill"
            counts["old" if found == old else "new"] += 1
            if found == old and chance.random() < 0.3:
                finished(job)  # the next run takes up what the killed one left, or starts anew
                assert content(target) == new, f"{name}: the next run gave another result"
                found = new
            if found == new:
                again(name)
        assert content(BASE) == base, f"{name}: the base has changed"
        seen[name] = counts
    left = sorted(p.name for p in FOLDER.iterdir() if p.name.startswith("."))
    sys.stdout.write(json.dumps({"seen": seen, "left": left}) + "\n")


main()
