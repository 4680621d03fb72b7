"""What a JSON value must be: small checks, put together to the schema of a kind of file.

A check takes a value from :func:`mosectl.inputs.parse_json` and raises Misfit, which gathers the way to the field as it
comes up: "facts[3].before: must be a text, found null".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], None]
_JSON = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}


class Misfit(ValueError):
    """A value that is not as it must be; ``path`` leads to it."""

    def __init__(self, what: str, path: str = "") -> None:
        self.what, self.path = what, path
        super().__init__(f"{path}: {what}" if path else what)

    def within(self, part: str) -> Misfit:
        """The same, seen from one level above."""
        dot = "." if self.path and not self.path.startswith("[") else ""
        return Misfit(self.what, f"{part}{dot}{self.path}")


def shown(value: Any) -> str:
    """A JSON value in few characters, for a message."""
    if isinstance(value, dict | list):
        return f"{_JSON[type(value)]} of {len(value)}"
    found = (
        {None: "null", True: "true", False: "false"}.get(value) if not isinstance(value, str | int | float) else None
    )
    return found or (f"'{value[:60]}'" if isinstance(value, str) else str(value).lower())


def _kind(what: str, *types: type) -> Check:
    def check(value: Any) -> None:
        if type(value) not in types:
            raise Misfit(f"must be {what}, found {shown(value)}")

    return check


text = _kind("a text", str)
flag = _kind("true or false", bool)
integer = _kind("a whole number", int)
number = _kind("a number", int, float)  # finite: parse_json takes no other
scalar = _kind("a text, a number, true, false or null", str, int, float, bool, type(None))


def anything(value: Any) -> None:
    """Whatever JSON can hold."""


def optional(inner: Check) -> Check:
    """null, or what ``inner`` asks."""

    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def within(least: int, most: int) -> Check:
    """A whole number of this range."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise Misfit(f"must be a whole number from {least} to {most}, found {shown(value)}")

    return check


def one_of(*values: str | int) -> Check:
    """A check that a value is one of these."""

    def check(value: Any) -> None:
        if type(value) not in (str, int) or value not in values:
            raise Misfit(f"{shown(value)} is not known, only {', '.join(map(shown, values))}")

    return check


def matching(pattern: re.Pattern[str], what: str) -> Check:
    """A text that is ``what``."""

    def check(value: Any) -> None:
        if type(value) is not str or not pattern.fullmatch(value):
            raise Misfit(f"must be {what}, found {shown(value)}")

    return check


def listed(item: Check, least: int = 0, most: int | None = None) -> Check:
    """A list of as many items."""

    def check(value: Any) -> None:
        if type(value) is not list or len(value) < least or (most is not None and len(value) > most):
            size = "" if most is None else f" of {least}" if least == most else f" of {least} to {most} items"
            raise Misfit(
                f"must be a list{size}{' that is not empty' * (most is None and least > 0)}, found {shown(value)}"
            )
        for i, x in enumerate(value):
            try:
                item(x)
            except Misfit as e:
                raise e.within(f"[{i}]") from None

    return check


def record(fields: Mapping[str, Check], more: Mapping[str, Check] | None = None, others: Check | None = None) -> Check:
    """An object with all of ``fields``; it may have ``more``, and ``others`` where that is given."""
    known = {**fields, **(more or {})}

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise Misfit(f"must be an object, found {shown(value)}")
        missing = [name for name in fields if name not in value]
        unknown = [] if others else [name for name in value if name not in known]
        if missing or unknown:
            raise Misfit(f"fields missing or unknown: {', '.join(sorted((missing + unknown)[:8]))[:200]}")
        for name, x in value.items():
            try:
                (known.get(name) or others or anything)(x)
            except Misfit as e:
                raise e.within(name[:80]) from None

    return check


def mapping(item: Check) -> Check:
    """An object of any names."""
    return record({}, others=item)
