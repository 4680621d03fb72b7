"""Markdown made of foreign text: what comes from a file stays text and never becomes HTML, a link, formatting or YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mosectl.text.shown import printable

_SIGNS = re.compile(r"[\\`*_\[\]<>&|~$]")
# Renderers make links of bare addresses and names even where their signs are escaped; a space of no width stops them.
_LINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)", re.IGNORECASE)

_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def inline(text: str) -> str:
    """``text`` to stand in a line or a cell of a table, after a first word or sign of ours."""
    return _LINKS.sub("\u200b", _SIGNS.sub(r"\\\g<0>", " ".join(printable(text, breaks=" ").split())))


def code(text: str) -> str:
    """``text`` between backticks, as many as it takes; not for a cell of a table, where "|" would end it."""
    text = printable(text, breaks=" ")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 and text.strip() else f"{fence} {text} {fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; columns named ">x" are numbers, aligned right."""
    yield _row([c.lstrip(">") for c in columns])
    yield "| " + " | ".join("--:" if c.startswith(">") else "---" for c in columns) + " |"
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(inline, cells)) + " |"


def front_matter(model: str, relation: str = "", library: str = "mosectl") -> str:
    """The head of a model card; ``model`` is named as its base if it can be a hub id with an owner."""
    import yaml

    about: dict[str, object] = {}
    if _HUB_ID.fullmatch(model):
        about = {"base_model": model, **({"base_model_relation": relation} if relation else {})}
    about |= {"library_name": library, "pipeline_tag": "text-generation", "tags": ["mosectl", "knowledge-editing"]}
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n"
