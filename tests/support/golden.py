"""Golden files: what the commands say, frozen. ``MOSECTL_GOLDENS=write pytest tests/test_goldens.py`` writes them anew.

Times, places, versions and hashes of computed numbers are masked; other numbers are written with three digits and
compared within 5 %, as another machine's linear algebra rounds differently, and within half where an optimiser found them.
What has to be exact is a test of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "goldens"
WRITE = os.environ.get("MOSECTL_GOLDENS") == "write"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
MASKED = re.compile(r"seconds|created|elapsed|per_second|device|memory|free|sha256|versions?$|^id$|digest|hash|^stats$")
HEX = re.compile(r"\b[0-9a-f]{8,64}\b")
TINY = 1e-4  # rounding noise: only that it is small is compared


def settled(value: Any, places: dict[str, str], key: str = "") -> Any:
    """A JSON value with all that may differ from run to run masked."""
    if MASKED.search(key) and not isinstance(value, dict | list):
        return f"<{key}>"
    if isinstance(value, dict):
        return {k: settled(v, places, key if "seconds" in key else k) for k, v in value.items()}
    if isinstance(value, list):
        if len(value) > 8 and all(isinstance(v, float) for v in value):  # a weight's sample
            return f"<{len(value)} numbers>"
        return [settled(v, places, key) for v in value]
    if isinstance(value, float):
        return 0.0 if abs(value) < TINY else float(f"{value:.3g}")
    return text(value, places) if isinstance(value, str) else value


def text(value: str, places: dict[str, str]) -> str:
    """A text with places, hashes, versions and times masked."""
    for place, name in sorted(places.items(), key=lambda p: -len(p[0])):
        value = value.replace(place, name)
    value = HEX.sub("<hex>", value)
    value = re.sub(r"\b\d+(\.\d+)? ?(s|ms|min)\b", "<time>", value)
    return re.sub(r"\b\d\.\d+\.\d+(\.dev\d+)?(\+\w+)?\b", "<version>", value)


def check(name: str, found: str, within: float = 0.05) -> None:
    """Hold a text against its golden file; numbers ``within`` that share of each other."""
    path = FOLDER / name
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
        return
    expected = path.read_text()
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected), f"{name}: MOSECTL_GOLDENS=write shows the change in git"
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        assert math.isclose(float(a), float(b), rel_tol=within, abs_tol=max(TINY, within - 0.05)), (
            f"{name}: {a} where {b} was"
        )


def check_json(name: str, document: str, places: dict[str, str], within: float = 0.05) -> None:
    check(name, json.dumps(settled(json.loads(document), places), indent=1, ensure_ascii=False) + "\n", within)
