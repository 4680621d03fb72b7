"""Facts that did not take, as a facts file beside the patch: what to edit again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mosectl.errors import OutputError
from mosectl.facts.writer import lines, unchanged
from mosectl.storage.atomic import output_errors, write_bytes
from mosectl.storage.inputs import read_bytes
from mosectl.storage.places import check_apart, check_new, new_file

if TYPE_CHECKING:
    from mosectl.editing.outcome import FactResult

Reads = Iterable[str | Path | None]
_FIX = "move it away, choose another -o, or give --overwrite"


def beside(out: Path) -> Path:
    """Where the facts stand that the patch ``out`` missed."""
    return out.with_name(f"{out.name}.missed.jsonl")


def check_missed(out: Path, facts: int, *, overwrite: bool, reads: Reads) -> None:
    """May the file of missed facts be written beside the patch ``out``? Asked before the work.

    Args:
        facts: how many are to be edited; one alone has no such file.
        overwrite: a file there that is not as mosectl wrote it may be replaced.
        reads: files that the work reads: none of them is replaced or taken away.
    Raises:
        OutputError: it may not.
    """
    path = beside(out).absolute()
    ours = _ours(path)
    if not ours and facts < 2:
        return
    check_apart(path, reads, "-o")
    if os.path.lexists(path) and not ours and not overwrite:
        raise OutputError("is not as mosectl edit wrote it: it would be lost", where=str(path), fix=_FIX)
    check_new(path, overwrite=True)


def write_missed(out: Path, results: Sequence[FactResult], *, overwrite: bool, reads: Reads) -> Path | None:
    """Write the facts that do not hold beside the patch ``out``; an older such file is replaced, or taken away.

    Args:
        overwrite, reads: as of :func:`check_missed`.
    Returns:
        The file; None where every fact holds, or only one was to be edited.
    Raises:
        OutputError: it cannot be written, or something else has appeared there.
    """
    path = beside(out)
    found = [(r.fact, r.status) for r in results if not r.holds]
    if not found or len(results) < 2:
        if _ours(path):
            with output_errors(path):
                path.unlink()
        return None
    with new_file(path, overwrite=overwrite or _ours(path), reads=reads) as place:
        write_bytes(place.ready(), lines(found))
    return path


def _ours(path: Path) -> bool:
    """Is it a file that mosectl wrote and that nobody has changed since?"""
    try:
        return unchanged(read_bytes(path, OutputError, _FIX))
    except OutputError:
        return False
