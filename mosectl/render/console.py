"""The only file that prints: results on stdout, progress, hints and errors on stderr.

On a terminal tables are drawn; in a pipe they become tab-separated lines, whole and without colour. Whatever is shown
goes through shown.py first; nothing in it is taken for markup or emoji.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mosectl.errors import MosectlError
from mosectl.text.jsonable import jsonable
from mosectl.text.shown import CONTINUED, escaped_json, plain, printable

if TYPE_CHECKING:
    from mosectl.storage.progress import OnStep
    from mosectl.text.table import Grid


LONGEST, DRAWN = 2_000, 200_000  # characters of a cell, and of a table, on a terminal


def _out() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def _err() -> Console:
    # The stream of now: a bar must go on while others' noise on sys.stderr is being swallowed.
    return Console(file=sys.stderr, stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _say(console: Console, *parts: tuple[str, str]) -> None:
    """One message of (text, style) parts; a line break in it does not begin a line like ours."""
    console.print(Text.assemble(*((printable(text, console.encoding, CONTINUED), style) for text, style in parts)))


def error(e: BaseException) -> None:
    """One message on stderr: what, where, what to do next."""
    if isinstance(e, MosectlError):
        what, fix = (f"{e.where}: " if e.where else "") + e.what, e.fix
    else:
        what = f"{type(e).__name__}: {e}"
        fix = "this is a bug in mosectl; MOSECTL_DEBUG=1 shows where. Please report it"
    _say(_err(), ("error", "bold red"), (f" {what}", ""))
    _next(fix)


def _next(fix: str) -> None:
    if fix:
        _say(_err(), ("  →", "green"), (f" {fix}", ""))


def interrupted(kept: str = "nothing half-written is left behind", fix: str = "") -> None:
    """Tell that the user has ended the command, and what it leaves."""
    warn("interrupted", f": {kept}")
    _next(fix)


def hint(text: str) -> None:
    """A line on stderr about what was done or comes next."""
    _say(_err(), (text, ""))


def warn(head: str, rest: str) -> None:
    """A line on stderr that begins in yellow."""
    _say(_err(), (head, "yellow"), (rest, ""))


def warning(message: Warning | str, category: type[Warning], filename: str, lineno: int) -> None:
    """A warning of others, as Python has it."""
    sys.stderr.write(plain([warnings.formatwarning(message, category, filename, lineno)]))


def data(value: Any) -> None:
    """One JSON document on stdout, whatever the value holds."""
    document = json.dumps(jsonable(value), ensure_ascii="utf" not in _out().encoding, indent=2)
    sys.stdout.write(escaped_json(document) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns named ">x" are numbers, aligned right."""
    console = _out()
    names = [c.lstrip(">") for c in columns]
    title, *cells = (printable(text, console.encoding) for text in (title, *names, *(c for row in rows for c in row)))
    whole = [cells[i : i + len(names)] for i in range(0, len(cells), len(names))]  # the names first
    if not console.is_terminal:
        sys.stdout.write(f"# {title}\n")
        for row in whole if any(names) else whole[1:]:
            sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.write("\n")
        return
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", header_style="bold", show_header=any(names)
    )
    for column, name in zip(columns, whole[0], strict=True):
        table.add_column(Text(name), justify="right" if column.startswith(">") else "left", overflow="fold")
    drawn = _drawable(whole[1:])
    for row in drawn:
        table.add_row(*map(Text, row))
    console.print(table, soft_wrap=False)
    if more := len(rows) - len(drawn):
        console.print(f"… and {more} more (all of them in a pipe, or with --json)")


def _drawable(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """As many rows as a terminal draws in a second or two, none of their cells longer than a screen."""
    out: list[list[str]] = []
    room = DRAWN
    for row in rows:
        cut = [cell if len(cell) <= LONGEST else f"{cell[:LONGEST]}…" for cell in row]
        room -= sum(map(len, cut))
        if room < 0:
            break
        out.append(cut)
    return out


def line(text: str) -> None:
    """A line on stdout."""
    _say(_out(), (text, ""))


@contextmanager
def progress(quiet: bool = False) -> Iterator[OnStep]:
    """A bar with ETA for each phase on stderr; on a pipe one line a phase, and one a minute while it lasts."""
    console = _err()
    if quiet:
        yield lambda phase, done, total: None
    elif not console.is_terminal:
        told: dict[str, float] = {}  # when each phase was last told of

        def say(phase: str, done: int, total: int) -> None:
            now = time.monotonic()
            if phase not in told:
                told[phase] = now
                _say(console, (f"{phase} …", ""))
            elif total > 1 and now - max(told.values()) >= 60:
                told[phase] = now
                _say(console, (f"{phase} {done}/{total}", ""))

        yield say
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def move(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(f"{printable(phase, console.encoding):<12}", total=total)
                bar.update(tasks[phase], completed=done, total=total)

            yield move


def text(content: str) -> None:
    """Plain text of many lines."""
    sys.stdout.write(printable(content.rstrip("\n"), _out().encoding, "\n") + "\n")


def tables(grids: Sequence[Grid], notes: Sequence[str] = ()) -> None:
    """Tables, and what to know about them."""
    for grid in grids:
        table(grid.title, grid.columns, grid.rows)
    for note in notes:
        line(f"note: {note}")


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
