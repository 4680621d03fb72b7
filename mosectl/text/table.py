"""A table on its way to the terminal or a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mosectl.text.shown import spreadsheet


@dataclass(frozen=True)
class Grid:
    """One table; columns named ">x" are numbers, aligned right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def csv_bytes(head: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> bytes:
    """A CSV file: no cell is a formula to a spreadsheet; None is empty, truth is "true" or "false"."""
    text = io.StringIO(newline="")
    table = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # so that no text ends a row
    table.writerow(head)
    for row in rows:
        table.writerow([str(c).lower() if isinstance(c, bool) else spreadsheet(c) for c in row])
    return text.getvalue().encode("utf-8", "backslashreplace")
