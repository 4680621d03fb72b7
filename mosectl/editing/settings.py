"""Names of settings: those before version 0.2, which stand in the records of patches, and those of today."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import wraps
from typing import Any, TypeVar

from mosectl.errors import Notice

# Old name, today's; records of patches (format 1) keep the old ones, so that old and new patches read alike.
RENAMED = {
    "insist": "unreached_weight_growth", "relax": "preservation_decay", "aim": "placement", "fisher": "optimizer",
    "drop": "nats_per_step", "sphere": "preserve_norm", "reach": "max_displacement", "protect": "previous_edit_weight",
    "rehearse": "replay_margin",
}  # fmt: skip
# Settings that are words today, with the numbers they were.
WORDS: dict[str, dict[str, int]] = {
    "placement": {"method": -1, "per-layer": 0, "spread": 1},
    "optimizer": {"natural-gradient": 1, "adam": 0, "published": 2},
    "fact_token": {"auto": 0, "subject_last": 1, "last": 2},
}
UNSAID = ("replies", "prompt_weight")  # not in a record where they are 0: older patches keep their bytes
Options = TypeVar("Options", bound=type)


def todays(name: str, value: Any) -> tuple[str, Any]:
    """A setting's name and value of today; an old name is taken with a notice."""
    if name not in RENAMED:
        return name, value
    now, value = of_today(name, value)
    told = f"the setting '{name}' is called '{now}' now: write {now}={value}; the old name ends with version 0.3"
    warnings.warn(Notice(told), stacklevel=3)
    return now, value


def taking_old_names(options: Options) -> Options:
    """A dataclass that takes old names of its fields, too."""
    made = options.__init__  # type: ignore[misc]

    @wraps(made)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        made(self, *args, **dict(todays(name, value) for name, value in given.items()))

    options.__init__ = __init__  # type: ignore[misc]
    return options


def of_today(name: str, value: Any) -> tuple[str, Any]:
    """A record's name and value of a setting as they are called today, for people to read."""
    now = RENAMED.get(name, name)
    return now, next((word for word, number in WORDS.get(now, {}).items() if number == value), value)


def recorded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under the names and values that a patch's record has for them."""
    old = {now: name for name, now in RENAMED.items()}
    return {old.get(name, name): WORDS[name][value] if name in WORDS else value for name, value in fields.items()}
