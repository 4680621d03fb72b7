"""Does a value from a file have the form that is worked with later? One small language for it.

A form is a type, a tuple of types, ``[form]`` for a list of such, or an object of names and forms, where a name that ends in
"?" may be missing or null and ``str`` stands for all other names; without it they may be of any form.
"""

from __future__ import annotations

from typing import Any

_NAMES = {
    dict: "an object", list: "a list", str: "a text", float: "a number", int: "a whole number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def misfit(value: Any, form: Any, where: str = "") -> str:
    """Where ``value`` is not of ``form`` and why; empty where it is. A whole number is a number, true and false are not."""
    kinds: tuple[type, ...]
    kinds = form if isinstance(form, tuple) else (type(form) if isinstance(form, list | dict) else form,)
    good: bool = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not good or (isinstance(value, bool) and bool not in kinds):
        return f"{where or 'the whole'} is not {' or '.join(_NAMES[k] for k in kinds)}"
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(form, list):
        parts = [(f"{where}[{i}]", x, form[0]) for i, x in enumerate(value)]
    elif isinstance(form, dict):
        named = {asked.removesuffix("?"): (asked, below) for asked, below in form.items() if asked is not str}
        for name, (asked, below) in named.items():
            if name not in value and name == asked:
                return f"{f'{where}.{name}'.lstrip('.')} is missing"
            if value.get(name) is not None or name == asked:
                parts.append((f"{where}.{name}", value[name], below))
        if str in form:
            parts += [(f"{where}.{name}", x, form[str]) for name, x in value.items() if name not in named]
    return next((found for at, x, below in parts if (found := misfit(x, below, at.lstrip(".")))), "")
