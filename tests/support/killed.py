"""Run by test_kill.py in an interpreter of its own: jobs in forked children, killed or racing, then looked at.

Usage: killed.py FOLDER kill|race TIMES. Nothing of torch runs in the parent, whose threads a fork would not take along.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf  # noqa: F401  (imported here, and not again in every child)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from mosectl.cli import main
from mosectl.storage import folders, places

FOLDER, TIMES = Path(sys.argv[1]), int(sys.argv[3])
BASE, FIRST, SECOND, FACTS = (FOLDER / n for n in ("base", "a.safetensors", "b.safetensors", "facts.jsonl"))
CALLS = ("open", "replace", "rename", "link", "fsync", "unlink", "mkdir", "rmdir")  # of os; pathlib and shutil use them


def command(*args: object) -> Callable[[], int]:
    """The command line, as a job that returns its exit code."""

    def job() -> int:
        sys.argv = ["mosectl", *map(str, args)]
        try:
            main.main()
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    return job


OUT = {name: FOLDER / f"{name}.out" for name in ("apply", "lora", "gguf", "merged", "merge", "edit", "train", "bench")}
OUT["revert"] = OUT["apply"]
BOTH = (FIRST, SECOND, "--allow-conflicts")
QUICK = ["--layers", "0,1", "--rounds", 1, "--corpus", FOLDER / "corpus.txt"]
for s in (
    "preserve=0.0001",
    "step_size=0.3",
    "optimizer=adam",
    "margin=3",
    "decay=0",
    "kl_weight=0",
    "prefixes=0",
    "wordings=0",
):
    QUICK += ["--set", s]
JOBS = {
    "apply": command("apply", *BOTH, "--model", BASE, "-o", OUT["apply"]),
    "revert": command("revert", FIRST, "--model", OUT["apply"], "--force"),
    "merge": command("merge", *BOTH, "-o", OUT["merge"]),
    "lora": command("export", *BOTH, "--model", BASE, "-o", OUT["lora"]),
    "gguf": command("export", *BOTH, "--model", BASE, "-o", OUT["gguf"], "--to", "gguf-lora"),
    "merged": command("export", *BOTH, "--model", BASE, "-o", OUT["merged"], "--to", "merged"),
    "edit": command("edit", FACTS, "--model", BASE, "-o", OUT["edit"], "--batch-size", 1, "--resume", *QUICK),
    "train": command(
        "train-editor", FOLDER / "more.jsonl", "--model", BASE, "-o", OUT["train"], "--rank", 4, "--steps", 4,
        "--every", 2, "--batch-size", 3, "--resume",
    ),
    "bench": command("bench", FOLDER / "bench.yaml", "-o", OUT["bench"]),
}  # fmt: skip


def forked(job: Callable[[], int], at: int = 0) -> int:
    """A child that does a job, and dies before its ``at``-th call to the file system; it keeps count of them."""
    child = os.fork()
    if child == 0:
        code, count = 1, [0]
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _counted(count, at)
            code = job()
        finally:
            (FOLDER / "calls").write_text(str(count[0]))
            os._exit(code)
    return child


def _counted(count: list[int], at: int) -> None:
    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    places.renameat2 = folders.renameat2 = wrapped(places.renameat2)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(name: str) -> None:
    code = ended(forked(JOBS[name]))
    assert code == 0, f"{name}: exit code {code}"


def content(path: Path) -> str:
    """A digest of a file, or of all files of a folder; "" where there is none."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(FOLDER)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def benched(path: Path) -> str:
    """What a bench has found, without its times; "" where it is not done. What is there is whole."""
    if not (path / "results.jsonl").exists():
        return ""
    *lines, last = (path / "results.jsonl").read_text().split("\n")
    records = [json.loads(line) for line in lines]  # only the last line may be cut off
    if last or len(records) < 2 or not all((path / n).exists() for n in ("tables.md", "norms.svg", "abilities.svg")):
        return ""
    assert (path / "norms.svg").read_text().endswith("</svg>\n") or "</svg>" in (path / "norms.svg").read_text()
    kept = sorted(({k: v for k, v in r.items() if k != "seconds"} for r in records), key=lambda r: r["key"])
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def looked(name: str) -> str:
    return benched(OUT[name]) if name == "bench" else content(OUT[name])


def again(name: str) -> None:
    """Back to where the job starts from."""
    for path in (OUT[name], OUT[name].with_name(OUT[name].name + ".progress")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if name == "revert":
        finished("apply")


def killed(name: str, took: float, calls: int, number: int, chance: random.Random) -> None:
    """A child of the job that is killed: at any instant, or at a call to the file system; the first half-way."""
    if number % 2 == 0:
        child = forked(JOBS[name], chance.randint(1, calls) if number else calls // 2)
    else:
        child = forked(JOBS[name])
        time.sleep(chance.uniform(0, 1.1 * took))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    ended(child)


def kill() -> dict[str, Any]:
    chance, seen, base = random.Random(0), {}, content(BASE)
    for name in JOBS:
        again(name)
        old, start = looked(name), time.perf_counter()
        finished(name)
        took, calls, new = time.perf_counter() - start, int((FOLDER / "calls").read_text()), looked(name)
        assert old != new and new, name
        again(name)
        counts = {"old": 0, "new": 0, "rerun": 0}
        times = TIMES // 2 if TIMES < 60 and name in ("edit", "train", "bench") else TIMES  # these take seconds
        for i in range(times):
            killed(name, took, calls, i, chance)
            found = looked(name)
            assert found in (old, new), f"{name}: half-written after a kill"
            counts["old" if found == old else "new"] += 1
            if found == old and (i == 0 or chance.random() < 0.3):
                finished(name)  # the next run takes up what the killed one left, or starts anew
                assert looked(name) == new, f"{name}: the next run gave another result"
                counts["rerun"] += 1
                found = new
                _nothing_left(name)
            if found == new:
                again(name)
        assert content(BASE) == base, f"{name}: the base has changed"
        seen[name] = counts
    return seen


def _nothing_left(name: str) -> None:
    left = [p.name for p in FOLDER.glob(f".{OUT[name].name}*")]
    assert not left, f"{name}: left behind: {left}"


def race() -> dict[str, Any]:
    """Two at once: one does it, the other is refused, whichever comes first."""
    seen: dict[str, Any] = {}
    for name in ("merge", "apply", "revert", "edit"):
        again(name)
        finished(name)
        new = looked(name)
        for _ in range(TIMES if name != "edit" else 1):
            again(name)
            children = [forked(JOBS[name]) for _ in range(2)]
            codes = sorted(map(ended, children))
            seen.setdefault(name, []).append(codes)
            # A revert that comes after the other finds nothing to revert: 5.
            assert codes in ([0, 7], [0, 5]) if name == "revert" else codes == [0, 7], f"{name}: exit codes {codes}"
            assert looked(name) == new, f"{name}: another result"
            _nothing_left(name)
    return seen


sys.stdout.write(json.dumps({"kill": kill, "race": race}[sys.argv[2]]()) + "\n")
