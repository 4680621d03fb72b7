"""`mosectl report`: what lies in a folder, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mosectl.cli.params import FILE, Json

PAGE = Path("report.html")


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with patches, documents of mosectl eval --json, results of a bench; or an edited model.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write; default: report.html here.", **FILE)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")] = False,
    as_json: Json = False,
) -> None:
    """Gather patches, evaluations and benches of a folder in one HTML file, to send on. Loads no model."""
    from mosectl.render import console
    from mosectl.report.folder import look_through, read_by
    from mosectl.report.pages import render, summary
    from mosectl.storage.atomic import write_bytes
    from mosectl.storage.places import new_file

    # First: whether a page may be written matters only where there is something to write. No model is read, only files.
    with console.progress() as on_step:
        found = look_through(folder, on_step)
    if out or not as_json:
        with new_file(out or PAGE, overwrite=overwrite, reads=read_by(folder)) as place:
            write_bytes(place.ready(), render(found).encode())
    for left in found.left_out:
        console.hint(f"left out: {left.file}: {left.why}")
    if as_json:
        console.data(found.to_record())
    else:
        console.line(summary(found))
    if out or not as_json:
        console.hint(f"written: {out or PAGE}")
