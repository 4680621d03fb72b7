"""Foreign text made fit to be shown: nothing in it moves a cursor, hides, reorders or passes for a line of ours."""

from __future__ import annotations

import html
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, direction marks, invisible format characters, tags, and
# half characters. Joiners, variation selectors and combining marks stay: scripts and emoji need them.
_UNFIT = (
    r"[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\ud800-\udfff]"
)
_FLAG = "\U0001f3f4[\U000e0030-\U000e007a]{2,6}\U000e007f"  # of a region: tags with a meaning
_SEARCH = re.compile(f"{_FLAG}|{_UNFIT}")
_UNFIT_ONLY = re.compile(_UNFIT)
_FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are full-width = + - @
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?", re.ASCII)
CONTINUED = "\n    "  # a line break within a message: no line of ours begins like that

SILENCE = "(nothing)"  # in tables, for an answer without a word; files for programs have the answer itself


def printable(text: str, encoding: str = "utf-8", breaks: str = r"\n") -> str:
    r"""``text`` with what does not belong on a terminal as an escape: \t, \x1b, \u202e.

    Args:
        encoding: of where it goes; characters that it lacks are escaped too.
        breaks: what stands for a line break.
    """
    if not text.isprintable():  # else there is nothing to do; a plain space counts as printable
        text = breaks.join(_SEARCH.sub(_fit, row) for row in re.split("\r?\n", text))
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _fit(found: re.Match[str]) -> str:
    return found[0] if len(found[0]) > 1 else found[0].encode("unicode_escape").decode()  # longer: a flag


def word(text: object) -> str:
    """``text`` as one word of a shell command that is suggested."""
    return shlex.quote(printable(str(text)))


def markup(text: str) -> str:
    """``text`` for HTML, SVG and XML, which have no escape for control characters."""
    return html.escape(printable(text, breaks="\n"))


def spreadsheet(cell: str | float | None) -> str | float | None:
    """A cell of a CSV file: what a spreadsheet takes for a formula gets an apostrophe (OWASP, "CSV Injection")."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def escaped_json(document: str) -> str:
    r"""A JSON document with the same characters as \uXXXX, which JSON reads back as they were; half characters too."""

    def escape(found: re.Match[str]) -> str:
        units = found[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))

    return "\n".join(_UNFIT_ONLY.sub(escape, row) for row in document.split("\n"))


def guard_streams() -> None:
    """Let no text fail for its characters, and nothing that Python or a library prints by itself pass as it is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_record)
    sys.excepthook = lambda kind, e, trace: _write(traceback.format_exception(kind, e, trace))


def _write(lines: Iterable[str]) -> None:
    sys.stderr.write(plain(lines))


def plain(lines: Iterable[str]) -> str:
    """What Python itself would print to stderr, its lines that break continued."""
    encoding = sys.stderr.encoding or "utf-8"
    return "".join(printable(line.rstrip("\n"), encoding, CONTINUED) + "\n" for line in lines)


def _record(*args: Any, **more: Any) -> logging.LogRecord:
    """What a library logs may quote a file or a server."""
    made = logging.LogRecord(*args, **more)
    with suppress(TypeError, ValueError):  # a message that does not fit its arguments: logging tells of it
        made.msg, made.args = printable(made.getMessage(), breaks=CONTINUED), None
    return made


def answer_cell(answer: str | None) -> str:
    """A model's answer as a cell of a table: a dash where it is not known, words where the model said nothing."""
    return "–" if answer is None else answer if answer.strip() else SILENCE


def before_and_after(before: str, after: str, p_before: float, p_after: float) -> tuple[str, str, str, str]:
    """Cells of a fact's answers, and of how likely the new object was."""
    return answer_cell(before), answer_cell(after), f"{p_before:.3f}", f"{p_after:.3f}"


def counted(n: int, one: str, several: str = "") -> str:
    """A number with its noun: "1 fact", "2 facts"."""
    return f"{n:,} {one if n == 1 else several or one + 's'}"
