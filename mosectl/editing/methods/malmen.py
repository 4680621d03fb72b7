"""MALMEN: HORSE without the spread of the residual, its predecessor and baseline (arXiv 2311.04661)."""

from __future__ import annotations

from mosectl.editing.methods.horse import Horse


class Malmen(Horse):
    """As :class:`~mosectl.editing.methods.horse.Horse`; the editor's network does not spread."""

    name, source, editor = "malmen", "arXiv 2311.04661", "malmen"
