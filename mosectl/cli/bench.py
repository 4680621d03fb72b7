"""`mosectl bench`: the command line of a bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosectl.cli.params import Device, Dtype, Json, OnError, resumable
from mosectl.errors import OutputError

if TYPE_CHECKING:
    from mosectl.bench.runner import Progress


def bench(
    config: Annotated[str, typer.Argument(help="Configuration, .yaml; see examples/bench-small.yaml.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; finished cells in it are kept.")],
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; make tables and pictures again from results.jsonl.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnError = "fail",
    as_json: Json = False,
) -> None:
    """Compare methods on models, datasets and numbers of edits; stop it at any time, the next start goes on."""
    from mosectl.render import console

    if out.exists() and not out.is_dir():
        raise OutputError("is not a folder", where=str(out), fix="give a folder after -o")
    from mosectl.bench.config import cells, read_bench
    from mosectl.bench.report import tables, write_report
    from mosectl.bench.runner import RESULTS, read_results, records_of, run_bench, unusable

    plan = read_bench(config, on_error)
    wanted = cells(plan, dtype)
    if not report_only:
        quiet = not sys.stderr.isatty()  # a log has a line a cell, that is enough
        with resumable(out / RESULTS, "the finished cells", "the same command goes on from there", resume=True):
            found = run_bench(
                plan,
                out,
                device=device,
                dtype=dtype,
                notice=console.hint,
                watch=lambda cell: console.progress(quiet),
                on_cell=_tell,
            )
    elif (out / RESULTS).is_file():
        found, bad = read_results(out / RESULTS)
        for line in unusable(out / RESULTS, bad):
            console.hint(line)
    else:
        raise OutputError(f"no {RESULTS}", where=str(out), fix="run the bench first, without --report-only")
    if missing := sum(c.key not in found for c in wanted):
        console.hint(f"{missing} of {len(wanted)} cells are not run yet")
    if other := len(set(found) - {c.key for c in wanted}):
        console.hint(f"{other} results are of other settings or another version, and not shown")
    written = write_report(plan, wanted, found, out)
    records = records_of(wanted, found)
    console.data({"cells": records, "notes": plan.notes}) if as_json else console.tables(
        tables(wanted, found), plan.notes
    )
    console.hint("written: " + ", ".join(map(str, [out / RESULTS, *written])))


def _tell(p: Progress) -> None:
    from mosectl.render import console

    what = "done" if p.record["status"] == "done" else f"FAILED: {p.record['reason']}"
    console.hint(
        f"{p.done}/{p.total} {p.cell}: {what}, {p.seconds:.1f} s" + (f", ETA {p.left:,.0f} s" if p.left else "")
    )
