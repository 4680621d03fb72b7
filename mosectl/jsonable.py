"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def jsonable(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them; tensors are left out, numbers that are not finite become null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):  # a tensor is known by its attribute: torch is slow to import
        return {str(k): jsonable(v) for k, v in value.items() if not hasattr(v, "untyped_storage")}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
