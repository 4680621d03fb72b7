"""The peak of memory, read anew from any moment: of a GPU, or of this process (Linux)."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch


def peak_bytes(device: str, before: int = 0) -> int:
    """The most that was held since :func:`reset_peak`, of the process beyond ``before``."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    return (1024 * int(found[1]) if found else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) - before


def reset_peak(device: str) -> None:
    """The peak is looked for from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # Linux: the peak starts anew from what is resident


def resident_bytes() -> int:
    """What the process holds now; 0 where that is not told."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    return 1024 * int(found[1]) if found else 0
