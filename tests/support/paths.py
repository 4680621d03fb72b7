"""Where the repository and its demo model lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-model"
