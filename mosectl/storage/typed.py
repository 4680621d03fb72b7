"""JSON values as dataclasses, by the types of their fields: the way back from what `--json` has printed.

For files from strangers: every value must be what its field says, as :func:`mosectl.storage.inputs.parse_json` gave it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mosectl.storage import schema
from mosectl.storage.schema import Misfit

_CHECKS: dict[Any, schema.Check] = {str: schema.text, bool: schema.flag, int: schema.integer}


def typed(kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``: a dataclass, tuple[X, ...], a mapping of texts, X | None, str, bool, int, float or Any.

    A field that has a default may be missing; one that is not known is refused. A float that is null was not finite.

    Raises:
        Misfit: with the way to what does not fit.
    """
    if kind is Any:
        return value
    if kind in _CHECKS:
        _CHECKS[kind](value)
        return value
    if kind is float:
        return _number(value)
    if is_dataclass(kind):
        return _record(kind, value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = (k for k in inner if k is not NoneType)
        return None if value is None else typed(other, value)
    if origin is tuple:
        schema.listed(schema.anything)(value)
        return tuple(_within(f"[{i}]", inner[0], x) for i, x in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        schema.mapping(schema.anything)(value)
        return {name: _within(name[:80], inner[1], x) for name, x in value.items()}
    raise TypeError(f"no JSON is read as {kind}")


def _record(kind: Any, value: Any) -> Any:
    known = fields(kind)
    needed = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    allowed = dict.fromkeys((f.name for f in known if f.name not in needed), schema.anything)
    schema.record(dict.fromkeys(needed, schema.anything), allowed)(value)
    hints = _hints(kind)
    return kind(**{name: _within(name, hints[name], x) for name, x in value.items()})


def _within(part: str, kind: Any, value: Any) -> Any:
    try:
        return typed(kind, value)
    except Misfit as e:
        raise e.within(part) from None


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    schema.number(value)
    return float(value)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
