"""Options that commands share, and what typer is told about files to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mosectl.errors import OutputError

Model = Annotated[str, typer.Option("--model", "-m", help="Model folder or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or balanced (all GPUs).")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Skip the check that the patch was made for this base.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N facts.")]
OnError = Annotated[str, typer.Option(help="Bad lines: fail, or skip them.")]
Corpus = Annotated[
    str | None,
    typer.Option(help="Text for statistics: .txt (one text a line) or .jsonl; default: a small embedded one."),
]


def output_file(text: str, option: str = "-o") -> Path:
    """A file to write; a name that ends in "/" is a folder's, which a Path would forget.

    Raises:
        OutputError: a folder is named.
    """
    try:
        folder = str(text).endswith(("/", os.sep)) or Path(text).is_dir()
    except OSError as e:  # a name too long
        raise OutputError(f"cannot write: {e.strerror}", where=str(text), fix="choose a shorter name") from e
    if text == "-":
        raise OutputError(
            "a patch is not written to standard output", where="-", fix=f"give a file name after {option}"
        )
    if folder:
        fix = f"give a file name after {option}, such as {Path(text) / 'name'}"
        raise OutputError("is a folder, not a file", where=str(text), fix=fix)
    return Path(text)


def file_option(option: str = "-o") -> dict[str, Any]:
    """What an option that names a file to write tells typer."""
    return {"parser": lambda text: output_file(text, option), "metavar": "FILE"}


FILE = file_option()
FACTS = "Facts file: .jsonl, .json or .csv; - for standard input."


def named(phase: str, on_step: Any) -> Any:
    """A progress callback (done, total) that names its phase."""
    return lambda done, total: on_step(phase, done, total)
