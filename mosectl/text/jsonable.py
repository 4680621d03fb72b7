"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

UNSAID = {"unsaid": True}  # metadata of a dataclass's field that is left out where it holds nothing
DEEPEST = 100  # levels; no file that is read has more than MAX_DEPTH


def said(value: Any) -> dict[str, Any]:
    """A dataclass's fields by name, without those that are left out where they hold nothing (UNSAID)."""
    held = ((f, getattr(value, f.name)) for f in fields(value))
    return {f.name: v for f, v in held if "unsaid" not in f.metadata or v}


def jsonable(value: Any, depth: int = 0) -> Any:
    """Dataclasses, paths and tuples as JSON has them; tensors are left out, numbers that are not finite become null.

    What is nested deeper than DEEPEST levels, an integer that Python does not write and any other object become a text.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = said(value)
    if depth > DEEPEST and isinstance(value, Mapping | list | tuple):
        return f"nested deeper than {DEEPEST}"
    if isinstance(value, Mapping):  # a tensor is known by its attribute: torch is slow to import
        return {str(k): jsonable(v, depth + 1) for k, v in value.items() if not hasattr(v, "untyped_storage")}
    if isinstance(value, list | tuple):
        return [jsonable(v, depth + 1) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
