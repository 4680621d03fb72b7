"""MALMEN: HORSE without the spread of the residual, its predecessor and baseline (arXiv 2311.04661)."""

from __future__ import annotations

from mosectl.editing.methods import register
from mosectl.editing.methods.horse import ONCE, horse

register(
    "malmen", side="additive", source="arXiv 2311.04661", kind="fit", trained="malmen", settings=ONCE, strength=1.0
)(horse)
