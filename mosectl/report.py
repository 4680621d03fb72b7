"""The only file that prints: results on stdout, progress, hints and errors on stderr.

On a terminal tables are drawn; in a pipe they become tab-separated lines, whole and without colour.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mosectl.errors import MosectlError
from mosectl.jsonable import jsonable

if TYPE_CHECKING:
    from mosectl.grid import Grid
    from mosectl.run import OnStep

LONGEST, DRAWN = 2_000, 200_000  # characters of a cell, and of a table, on a terminal


def _out() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _err() -> Console:
    # The stream of now: a bar must go on while others' noise on sys.stderr is being swallowed.
    return Console(file=sys.stderr, stderr=True, highlight=False, soft_wrap=True)


def error(e: BaseException) -> None:
    """One message on stderr: what, where, what to do next."""
    if isinstance(e, MosectlError):
        where = f"{e.where}: " if e.where else ""
        _err().print(f"[bold red]error[/] {escape(where + e.what)}")
        if e.fix:
            _err().print(f"  [green]→[/] {escape(e.fix)}")
    else:
        _err().print(f"[bold red]error[/] {escape(f'{type(e).__name__}: {e}')}")
        _err().print("  [green]→[/] this is a bug in mosectl; MOSECTL_DEBUG=1 shows where. Please report it")


def interrupted() -> None:
    _err().print("[yellow]interrupted[/]: nothing half-written is left behind")


def hint(text: str) -> None:
    """A line on stderr about what was done or comes next."""
    _err().print(escape(text))


def warn(head: str, rest: str) -> None:
    """A line on stderr that begins in yellow."""
    _err().print(f"[yellow]{escape(head)}[/]{escape(rest)}")


def data(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(jsonable(value), ensure_ascii=False, indent=2) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns named ">x" are numbers, aligned right."""
    console = _out()
    names = [c.lstrip(">") for c in columns]
    if not console.is_terminal:
        sys.stdout.write(f"# {title}\n")
        for row in (names, *rows) if any(names) else rows:
            sys.stdout.write("\t".join(" ".join(cell.split()) for cell in row) + "\n")
        sys.stdout.write("\n")
        return
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", header_style="bold", show_header=any(names)
    )
    for column, name in zip(columns, names, strict=True):
        table.add_column(escape(name), justify="right" if column.startswith(">") else "left", overflow="fold")
    drawn = _drawable(rows)
    for row in drawn:
        table.add_row(*map(escape, row))
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
    _out().print(escape(text))


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
                console.print(escape(f"{phase} …"))
            elif total > 1 and now - max(told.values()) >= 60:
                told[phase] = now
                console.print(escape(f"{phase} {done}/{total}"))

        yield say
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def move(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(f"{phase:<12}", total=total)
                bar.update(tasks[phase], completed=done, total=total)

            yield move


def text(content: str) -> None:
    """Plain text, as it is."""
    sys.stdout.write(content.rstrip("\n") + "\n")


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


def debugging() -> bool:
    """Did the user ask for tracebacks?"""
    return os.environ.get("MOSECTL_DEBUG", "") not in ("", "0")
