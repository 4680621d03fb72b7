"""Which of ``accelerate launch``'s processes this is. Without it: the only one."""

from __future__ import annotations

import os
from typing import Any


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """The process that writes and speaks for all."""
    return rank() == 0


def join() -> Any:
    """accelerate's ``PartialState``, the processes connected: by gloo on CPUs, which it does not see by itself."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def process_device(device: str) -> str:
    """The GPU of this process where "auto" is asked for and there are several processes."""
    return str(join().device) if device == "auto" and world() > 1 else device
