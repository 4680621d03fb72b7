"""What fields are called in a file, where the user says so: --read FIELD=NAME."""

from __future__ import annotations

from collections.abc import Sequence

from mosectl.errors import UsageError
from mosectl.facts.shapes import Chosen
from mosectl.facts.shapes.own import NAMES

FIELDS = tuple(name for name in NAMES if name != "space_before_target")


def choices(given: Sequence[str], option: str = "--read") -> Chosen:
    """Our fields with the names that the user gives them; several of one field in their order.

    Args:
        given: texts such as "target_new=answers".
    Raises:
        UsageError: no such field, or not FIELD=NAME.
    """
    out: dict[str, tuple[str, ...]] = {}
    for text in given:
        field, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise UsageError(f"{option} {text}: not FIELD=NAME", fix=f"such as {option} target_new=answers")
        if field not in FIELDS:
            raise UsageError(f"{option} {text}: no such field '{field}'", fix=f"choose from {', '.join(FIELDS)}")
        out[field] = (*out.get(field, ()), name)
    return out
