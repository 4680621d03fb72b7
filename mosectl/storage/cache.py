"""The folder of what mosectl keeps between commands: statistics, GGUF files unpacked."""

from __future__ import annotations

import os
from pathlib import Path

FIX = "set MOSECTL_CACHE to a folder of your own"


def cache_dir() -> Path:
    """$MOSECTL_CACHE, else $XDG_CACHE_HOME/mosectl, else ~/.cache/mosectl."""
    if own := os.environ.get("MOSECTL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosectl"
