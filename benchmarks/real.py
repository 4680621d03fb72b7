"""What an edit of a real model takes, by phase, in CPU seconds of a process of its own.

    python benchmarks/real.py --on MODEL=FACTS [--on …]       # MODEL: a folder or hub id, FACTS: what that model knows

For each model: one fact with nothing kept (statistics and all), then twelve with the statistics kept, in the default form
and in the dense one, whose solve is how it was done before. Without --on nothing is run, which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = (("one fact, nothing kept", 1, ()), ("12 facts, statistics kept", 12, ()), ("dense", 12, ("--form", "dense")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", action="append", default=[], metavar="MODEL=FACTS")
    parser.add_argument("options", nargs="*", help="of mosectl edit, after --")
    args = parser.parse_args()
    if not args.on:
        print(json.dumps({"part": "real", "skipped": "no real model: give --on MODEL=FACTS"}))
    for pair in args.on:
        model, _, facts = pair.partition("=")
        if not Path(facts).is_file():
            print(json.dumps({"part": "real", "model": model, "skipped": f"there is no facts file '{facts}'"}))
            continue
        _measure(model, Path(facts).read_text("utf-8").splitlines(), args.options)


def _measure(model: str, lines: list[str], options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        solve, same = 0.0, []
        for what, n, form in RUNS:
            row = _edit(model, lines[:n], [*form, *same, *options], Path(folder))
            # The first edit's: their statistics are kept.
            same = same or ["--layers", ",".join(map(str, row["layers"]))]
            row = {"part": "real", "model": Path(model).name, "what": what, **row}
            solve = solve or (row["seconds"]["solve"] if n > 1 else 0.0)
            ratio = {"dense against compact": round(row["seconds"]["solve"] / solve, 1)} if form else {}
            print(json.dumps({**row, **ratio}), flush=True)


def _edit(model: str, lines: list[str], options: list[str], folder: Path) -> dict[str, Any]:
    """One `mosectl edit` with its statistics kept in ``folder``: CPU seconds, phases, what was reached."""
    facts, patch = folder / "facts.jsonl", folder / "patch.safetensors"
    facts.write_text("\n".join(lines), "utf-8")
    command = [sys.executable, "-m", "mosectl", "edit", facts, "--model", model, "-o", patch, "--overwrite", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*map(str, command), *options], capture_output=True, text=True, check=False,
        env={**os.environ, "MOSECTL_CACHE": str(folder / "cache")},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    told = json.loads(done.stdout)
    return {
        "facts": len(lines),
        "layers": told["edited_layers"],
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "seconds": {k: round(v, 1) for k, v in told["seconds"].items()},
        "scores": {k: told["scores"][k] for k in ("reliability", "generalization", "locality")},
        "patch_mb": round(patch.stat().st_size / 1e6, 2),
        "largest_sigma_drift": max(s["spectrum_drift"] for s in told["stability"]),
    }


if __name__ == "__main__":
    main()
