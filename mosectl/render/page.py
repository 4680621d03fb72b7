"""A page as data, and drawn as one HTML file that fetches nothing.

Every text passes :func:`_fit` and then jinja2's escaping; only the pictures of charts.py, which escape what they quote, and
the files beside the template go in as they are. The page's own policy names its one style and its one script by their
hashes: whatever else would run is not run, even if something got past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
from markupsafe import Markup

from mosectl.text.shown import printable

NOTHING = ("–", "")
DASH = "–: not asked, not recorded, or not to be known; of an interval: no value varied."
SENTENCE = 36  # characters of a cell from which on its column is one of sentences, and not made narrow
_UNBROKEN = re.compile(r"\S{32}")  # a run that no column is made wide for: a path, a hash, a very long word
_JOINT = re.compile(r"\S[^\w.,:;'\"()]\S")  # where a line may end within a word
LONGEST = 24  # characters of a word that fits a column
_KINDS = {">": "number", "!": "word", "~": "prose"}


@dataclass(frozen=True)
class Mark:
    """A cell that judges."""

    text: str
    good: bool | None  # None: neither


Cell = str | Mark


@dataclass(frozen=True)
class Column:
    """A column of a table: of "text", "prose" (a few words wide), "number" (aligned right) or "word" (never wrapped)."""

    name: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Rows that a reader can sort by any column; ``table`` makes one of them."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    about: str = ""  # below it
    cards: bool = False  # of sentences: on a narrow screen a card a row, where others are scrolled
    folded: str = ""  # what stands for it until it is unfolded; empty: it is open
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    soft: bool = True  # beside the point: in the softer colour
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Picture:
    """An SVG of charts.py."""

    svg: str
    about: str = ""
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Terms:
    """Terms and what they say."""

    items: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "terms"


Block = Table | Words | Picture | Terms


@dataclass(frozen=True)
class Section:
    """A heading, what stands below it, and sections within."""

    title: str
    blocks: tuple[Block, ...] = ()
    parts: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    lead: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    contents: bool = False  # with links to its sections
    foot: tuple[str, ...] = ()


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], **rest: Any) -> tuple[Table, ...]:
    """A table without the columns of numbers in which no row has any; nothing where there is no row.

    Args:
        head: names; ">x" is a column of numbers, "!x" one of words that stand in one line, "~x" one of sentences. One that
            is none of these counts as one of sentences where a cell is long.
        rest: the other fields of :class:`Table`.
    """
    if not rows:
        return ()
    kept = [i for i, name in enumerate(head) if not name.startswith(">") or any(row[i] not in NOTHING for row in rows)]
    columns = tuple(Column(head[i].lstrip(">!~"), _kind(head[i], [row[i] for row in rows])) for i in kept)
    return (Table(columns, tuple(tuple(row[i] for i in kept) for row in rows), **rest),)


def _kind(name: str, cells: Sequence[Cell]) -> str:
    given = _KINDS.get(name[:1], "text")
    long = given == "text" and any(isinstance(c, str) and len(c) > SENTENCE for c in cells)
    return "prose" if long else given


def firm(head: Sequence[str], columns: int = 1) -> tuple[str, ...]:
    """Names of columns, the first ones of words that stand in one line."""
    return (*(f"!{name}" for name in head[:columns]), *head[columns:])


def sections(*found: Section | None) -> tuple[Section, ...]:
    """Those that hold anything."""
    return tuple(s for s in found if s and (s.blocks or s.parts))


def draw(page: Page) -> str:
    """The page as HTML."""
    style, script = (Markup(_beside(name)) for name in ("page.css", "sort.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return _environment().get_template("page.html.j2").render(page=page, style=style, script=script, policy=policy)


class _Beside(BaseLoader):
    """Templates that come with the package."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
        try:
            return _beside(template), None, None
        except OSError as e:
            raise TemplateNotFound(template) from e


@cache
def _beside(name: str) -> str:
    return (files("mosectl.render") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=_Beside(),
        autoescape=True,
        finalize=_fit,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"picture": Markup, "words": str.split}
    made.tests |= {"unbroken": _unbroken, "joined": _joined}
    return made


def _fit(value: Any) -> Any:
    """What goes into the page, before it is escaped: no control characters, none that turn the direction of text."""
    return value if isinstance(value, Markup) else printable(str(value), breaks="\n")


def _unbroken(text: str) -> bool:
    """Does it hold a run of characters that may be broken, as no line is as long?"""
    return _UNBROKEN.search(text) is not None


def _joined(word: str) -> bool:
    """Would a browser break this word, which is not too long for a line?"""
    return len(word) <= LONGEST and _JOINT.search(word) is not None


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
