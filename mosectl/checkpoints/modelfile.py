"""A Modelfile for Ollama beside an adapter: which model it stands on, and where it lies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mosectl.errors import Notice, OutputError
from mosectl.storage.inputs import read_bytes
from mosectl.storage.places import new_file

NAME = "Modelfile"
MARK = "# Written by mosectl export"
_LARGEST = 1_000_000  # bytes of a Modelfile that is looked into


@contextmanager
def beside(adapter: Path, base: str | None) -> Iterator[Path | None]:
    """Write a Modelfile beside ``adapter`` when the block ends well; gives its path, None where none is written.

    One that mosectl has not written is left as it is, and the lines for it are told.

    Args:
        base: a GGUF file, or the name that Ollama has for a model; None: no Modelfile is wanted.
    Raises:
        OutputError: it cannot be written.
    """
    path = adapter.absolute().with_name(NAME)
    if base is None or path == adapter.absolute():
        yield None
        return
    lines = _lines(adapter.absolute(), base)
    if odd := next((line for line in lines if not line.isprintable()), ""):
        warnings.warn(f"no Modelfile is written: Ollama cannot read the name in {odd!a}", Notice, stacklevel=3)
        yield None
    elif os.path.lexists(path) and not _ours(path):
        what = f"{path} is not mosectl's and is left as it is; what Ollama needs: {' and '.join(lines)}"
        warnings.warn(what, Notice, stacklevel=3)
        yield None
    else:
        with new_file(path, overwrite=True) as place:
            yield path
            place.ready().write_text("\n".join([f"{MARK}: ollama create NAME -f {NAME}", *lines, ""]), "utf-8")


def _lines(adapter: Path, base: str) -> list[str]:
    file = Path(base).absolute()
    if file.is_file():
        base = f"./{file.name}" if file.parent == adapter.parent else str(file)
    # Ollama takes off the outer quotes and reads what is between them as it is, quotes and backslashes too.
    return [f'FROM "{base}"', f'ADAPTER "./{adapter.name}"']


def _ours(path: Path) -> bool:
    try:
        return read_bytes(path, OutputError, "", _LARGEST).startswith(MARK.encode())
    except OutputError:
        return False
