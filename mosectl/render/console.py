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
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mosectl.errors import MosectlError
from mosectl.storage.progress import SlippedDone
from mosectl.text.jsonable import jsonable
from mosectl.text.shown import CONTINUED, SILENCE, escaped_json, plain, printable

if TYPE_CHECKING:
    from mosectl.storage.progress import BatchDone, OnStep
    from mosectl.text.table import Grid


LONGEST, DRAWN = 2_000, 200_000  # characters of a cell, and of a table, on a terminal


def _out() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, force_jupyter=False)


_standing: list[Console] = []  # of the bars that stand on the terminal


def _err() -> Console:
    if _standing:  # above the bars: a console of its own would write behind them, on their line
        return _standing[-1]
    # The stream of now: a bar must go on while others' noise on sys.stderr is being swallowed.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "force_jupyter": False}
    return Console(file=sys.stderr, stderr=True, soft_wrap=True, **plain)


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


def stopped(written: Sequence[str]) -> None:
    """Tell of Ctrl-C where there is nothing to go on with: after outputs were ``written``, nothing was interrupted."""
    if written:
        warn("Ctrl-C", f" came after {', '.join(written)} was written: nothing of it is missing")
    else:
        interrupted()


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
    drawn = _drawable(whole[1:])
    for column, name, width in zip(columns, whole[0], _widths([whole[0], *drawn], console.width), strict=True):
        side: Any = "right" if column.startswith(">") else "left"
        table.add_column(Text(name), justify=side, overflow="fold", width=width)
    for row in drawn:
        table.add_row(*(Text(cell, style="dim" if cell == SILENCE else "") for cell in row))
    console.print(table, soft_wrap=False)
    if more := len(rows) - len(drawn):
        console.print(f"… and {more} more (all of them in a pipe, or with --json)")


def _widths(rows: Sequence[Sequence[str]], room: int) -> Sequence[int | None]:
    """Widths of columns by which no word is broken, where ``room`` is too narrow for whole cells; else rich's own."""
    cells = list(zip(*rows, strict=True))
    room -= 3 * len(cells) + 1  # borders and padding
    whole = [max(map(cell_len, column)) for column in cells]
    least = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    spare, wanted = room - sum(least), sum(whole) - sum(least)
    if spare < 0 or wanted <= spare:
        return [None] * len(cells)
    return [a + (b - a) * spare // wanted for a, b in zip(least, whole, strict=True)]


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
    """A bar with ETA for each phase, on stderr or in a notebook; on a pipe a line for each, and one a minute while it lasts.

    What it gives is the ``on_step`` of edits and evaluations. A run of several batches is told of below its bars, on a pipe
    by a line after each. In Jupyter bars need ipywidgets; without it there are lines.
    """
    console, cell = _err(), _cell()
    if quiet:
        yield lambda phase, done, total: None
    elif cell:  # a thread of rich's own would draw into whatever cell runs when it comes to it
        how: dict[str, Any] = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        with _Drawn(*_COLUMNS, TimeRemainingColumn(), console=cell, **how) as bars:
            try:
                yield bars
            finally:
                bars.refresh()
    elif console.is_terminal:
        with Bars(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True) as bars:
            _standing.append(console)
            try:
                yield bars
            finally:
                _standing.pop()
    else:
        yield _Lines(console)


_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("ETA"),
)


def _cell() -> Console | None:
    """A notebook's cell, if there is one that can show a bar."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_jupyter and find_spec("ipywidgets") else None


class _Lines:
    """Progress on a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, float] = {}  # when each phase was last told of

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase not in self._told:
            self._told[phase] = now
            _say(self._console, (f"{phase} …", ""))
        elif total > 1 and now - max(self._told.values()) >= 60:
            self._told[phase] = now
            _say(self._console, (f"{phase} {done}/{total}", ""))

    def batch(self, done: BatchDone | SlippedDone) -> None:
        """A line a batch."""
        _say(self._console, (", ".join(_of_batch(done)), ""))


class Bars(Progress):
    """Progress on a terminal: a bar a phase, and below them how the last batch left the run and the model."""

    def __init__(self, *columns: Any, **how: Any) -> None:
        self._numbers: dict[str, Any] = {}  # of a phase's bar
        self._last: list[str] = []  # lines about the last batch
        super().__init__(*columns, **how)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """A phase has come so far."""
        for other in self.tasks:
            if other.id != self._numbers.get(phase) and other.stop_time is None:
                self.stop_task(other.id)  # one phase at a time
        if phase not in self._numbers:
            self._numbers[phase] = self.add_task(f"{printable(phase, self.console.encoding):<12}", total=total)
        _go_on(self, self._numbers[phase])
        self.update(self._numbers[phase], completed=done, total=total)

    def batch(self, done: BatchDone | SlippedDone) -> None:
        """What is below the bars is about this batch from now on."""
        self._last = [printable(part, self.console.encoding) for part in _of_batch(done)]
        self.refresh()

    def get_renderables(self) -> Iterator[Any]:
        """The bars, and what is below."""
        yield from super().get_renderables()
        yield from map(Text, self._last)


class _Drawn(Bars):
    """Bars that are drawn as they move, ten times a second at most."""

    def __init__(self, *columns: Any, **how: Any) -> None:
        self._drawn = 0.0
        super().__init__(*columns, **how)

    def __call__(self, phase: str, done: int, total: int) -> None:
        super().__call__(phase, done, total)
        if time.monotonic() - self._drawn >= 0.1:
            self.refresh()
            self._drawn = time.monotonic()


def _of_batch(b: BatchDone | SlippedDone) -> tuple[str, ...]:
    """How far the run is, and how the model is: each fits a terminal's line."""
    if isinstance(b, SlippedDone):
        again = f"{b.edited} facts edited again at the end: {b.held} of {b.total} lead, {b.held_before} did before"
        return (again, f"left as they were then: {b.ended}") if b.ended else (again,)
    left = f", at this pace {b.seconds_left:,.0f} s more" if b.number < b.batches else ""
    earlier = f"earlier facts: {b.earlier_held} of {b.earlier_asked} hold, " if b.earlier_asked else ""
    text = "" if b.text_loss is None else f"text loss {b.text_loss:+.3f} nats a token, "
    run = f"batch {b.number}/{b.batches} done{left}: {b.held} of {b.facts} facts held right after"
    return run, f"{earlier}{text}‖W‖ drift {b.norm_drift:.1e}"


def _go_on(bar: Progress, number: Any) -> None:
    """Let a bar's clock run, without the time it stood still; a bar that was full once may fill again."""
    task = next(task for task in bar.tasks if task.id == number)
    if task.stop_time is not None and task.start_time is not None:
        task.start_time += task.get_time() - task.stop_time
        task.stop_time = None
    task.finished_time = None


def text(content: str) -> None:
    """Plain text of many lines."""
    sys.stdout.write(printable(content.rstrip("\n"), _out().encoding, "\n") + "\n")


def tables(grids: Sequence[Grid], notes: Sequence[str] = ()) -> None:
    """Tables, those without rows left out, and what to know about them."""
    for grid in filter(lambda grid: grid.rows, grids):
        table(grid.title, grid.columns, grid.rows)
    for note in notes:
        line(f"note: {note}")


def in_one_unit(sizes: Sequence[float]) -> tuple[str, list[str]]:
    """Bytes for people, as a column: the unit of the largest, at least kB, and each in it; small ones by one digit."""
    unit, one = next(((u, x) for u, x in (("GB", 1e9), ("MB", 1e6)) if max(sizes, default=0) >= x), ("kB", 1e3))
    return unit, [f"{n / one:,.1f}" if n >= 0.1 * one else f"{n / one:.1g}" for n in sizes]


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
