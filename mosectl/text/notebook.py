"""The way from a result to what a notebook shows of it."""

from __future__ import annotations

import importlib


def shown(value: object) -> str:
    """HTML of a result, for its ``_repr_html_``.

    What is shown lives in render/, above the classes that have results; by name, only a notebook that asks imports it.
    """
    return str(importlib.import_module("mosectl.render.notebook").html(value))
