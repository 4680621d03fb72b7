"""Options that commands share, and what typer is told about files to write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.errors import OutputError

if TYPE_CHECKING:
    from mosectl.storage.places import Place

Model = Annotated[str, typer.Option("--model", "-m", help="Model folder, .gguf file or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or balanced (all GPUs).")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's; float32 on CPUs without bfloat16 products), float32, bfloat16, float16."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Skip the check that the patch was made for this base.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N facts.")]
Read = Annotated[
    list[str] | None,
    typer.Option(
        "--read",
        metavar="FIELD=NAME",
        help="What the file calls a field, e.g. target_new=answers (zsRE as MEMIT reads it), subject=prompt (the whole "
        "prompt). Repeatable.",
    ),
]
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
FACTS = "Facts file: .jsonl, .json or .csv; - for standard input; or hf://datasets/user/repo."


def named(phase: str, on_step: Any) -> Any:
    """A progress callback (done, total) that names its phase."""
    return lambda done, total: on_step(phase, done, total)


def not_thrown_away(state: Path, resume: bool, overwrite: bool, what: str) -> None:
    """The state that an interrupted run has left is gone on with or given up only as the user says.

    Raises:
        OutputError: it is there, and neither --resume nor --overwrite was given.
    """
    from mosectl.storage.atomic import output_errors

    with output_errors(state):
        if state.exists() and not resume and not overwrite:
            fix = "give --resume to go on with it, or --overwrite to start again"
            raise OutputError(what, where=str(state), fix=fix)


class Interrupted(Exception):
    """Ctrl-C where something is kept to go on with."""

    def __init__(self, kept: str, fix: str) -> None:
        self.kept, self.fix = kept, fix
        super().__init__(f"{kept}\n  → {fix}")


@contextmanager
def resumable(state: Path, holds: str, fix: str, *, resume: bool) -> Iterator[None]:
    """Inside the block Ctrl-C tells of the work that ``state`` holds, where it is this run's.

    Args:
        resume: what is there before belongs to this run.
    Raises:
        Interrupted: Ctrl-C, and there is such work.
    """
    before = None if resume else _written(state)
    try:
        yield
    except KeyboardInterrupt:
        if _written(state) not in (None, before):
            raise Interrupted(f"{state} holds {holds}", fix) from None
        raise


def _written(path: Path) -> int | None:
    """When a file was written last; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def claimed(
    files: Mapping[str, Path | None], picture: str, overwrite: bool, reads: Sequence[str | None], stack: ExitStack
) -> dict[str, Place]:
    """Where to write each file, by its option, ours from here on: what stands in the way is found before the work.

    Args:
        picture: the option whose file matplotlib draws.
    Raises:
        UsageError: matplotlib is missing. OutputError: a file is there, or cannot be written.
    """
    from mosectl.storage.places import new_file

    if files.get(picture):
        from mosectl.render.charts import check_matplotlib

        check_matplotlib(picture)
    how: dict[str, Any] = {"overwrite": overwrite, "reads": reads}
    return {o: stack.enter_context(new_file(p, option=o, **how)) for o, p in files.items() if p}
