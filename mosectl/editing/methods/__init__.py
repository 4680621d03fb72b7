"""Methods, one file each: from the keys an edited layer sees and what it should write for them to a new weight.

This module finds them and imports none before it is asked for; what a method is stands in base.py.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from mosectl.errors import UsageError

if TYPE_CHECKING:
    from mosectl.editing.methods.base import Method

GROUP = "mosectl.methods"  # of entry points
DEFAULT = "isospectral"
_NOT_METHODS = ("__init__", "base")


@cache
def built_in() -> tuple[str, ...]:
    """Names of mosectl's own methods, the default first: a file horse_isospectral.py is "horse-isospectral"."""
    files = (path.stem for path in Path(__file__).parent.glob("*.py"))
    found = sorted(stem.replace("_", "-") for stem in files if stem not in _NOT_METHODS)
    return (DEFAULT, *(name for name in found if name != DEFAULT))


def names() -> tuple[str, ...]:
    """Names of all methods: mosectl's own, then those of other packages."""
    return (*built_in(), *sorted(point.name for point in _points() if point.name not in built_in()))


@cache
def method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        UsageError: there is no such method, or another package's cannot be used.
    """
    from mosectl.editing.methods.base import Method

    if name in built_in():
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        own = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method))
        return next(c for c in own if vars(c).get("name") == name)()
    point = next((p for p in _points() if p.name == name), None)
    if point is None:
        raise UsageError(f"unknown method '{name}'", fix=f"choose one of: {', '.join(names())}")
    return _loaded(point)


def _points() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _loaded(point: EntryPoint) -> Method:
    """The method of another package's entry point: a subclass of Solver or Trainer of the same name."""
    from mosectl.editing.methods.base import Solver, Trainer

    where = f"the package {point.dist.name if point.dist else point.value}"
    try:
        found = point.load()
    except Exception as e:  # the code of others
        what = f"method '{point.name}' cannot be loaded: {type(e).__name__}: {e}"
        raise UsageError(what, where=where, fix="update or uninstall that package") from e
    kinds = isinstance(found, type) and issubclass(found, Solver | Trainer)
    missing = [a for a in ("name", "side", "source") if not getattr(found, a, "")] if kinds else ["Solver or Trainer"]
    if missing or found.name != point.name or getattr(found, "__abstractmethods__", None):
        what = f"method '{point.name}' is not a whole subclass of Solver or Trainer of that name"
        fix = "see docs/how-to/add-a-method.md; its author can mend it"
        raise UsageError(what, where=where, fix=fix)
    method: Method = found()
    return method
