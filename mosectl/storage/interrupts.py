"""Ctrl-C, remembered until it is obeyed.

KeyboardInterrupt may be raised in code that does not pass it on: a callback, a finaliser, an import that a library tries
(PyTorch's of NumPy, from C++). The work would go on as if nothing had been pressed. So it is raised again until it is on its
way out, and no output is moved to where it belongs once Ctrl-C was pressed.
"""

from __future__ import annotations

import _thread
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY = 0.1  # seconds from one KeyboardInterrupt to the next, where the one before was swallowed


@dataclass
class _Ear:
    listening: bool = False
    pressed: bool = False
    held: int = 0  # blocks that Ctrl-C waits for
    whole: list[Path] = field(default_factory=list)
    unraisable: Any = None  # the hook of before


_ear = _Ear()


def listen() -> None:
    """Hear Ctrl-C from now on; what was heard and written before is forgotten."""
    global _ear
    _ear = _Ear(listening=True, unraisable=sys.unraisablehook)
    sys.unraisablehook = _not_told_when_swallowed
    signal.signal(signal.SIGINT, _heard)


def stop() -> None:
    """What comes is the way out: Ctrl-C is no longer answered."""
    signal.signal(signal.SIGINT, lambda *_: None)
    if _ear.listening:
        _ear.listening = False
        sys.unraisablehook = _ear.unraisable


def pressed() -> bool:
    """Was Ctrl-C pressed?"""
    return _ear.pressed


def written() -> list[Path]:
    """The outputs that stand where they belong."""
    return _ear.whole


@contextmanager
def publishing(path: Path) -> Iterator[None]:
    """The block moves a finished output to ``path``: not once Ctrl-C was pressed; Ctrl-C in the block waits for its end.

    Raises:
        KeyboardInterrupt.
    """
    _check()
    _ear.held += 1
    try:
        yield
        _ear.whole.append(path)
    finally:
        _ear.held -= 1
    _check()


def _check() -> None:
    if _ear.listening and _ear.pressed:
        raise KeyboardInterrupt


def _heard(*_: Any) -> None:
    if not _ear.pressed:
        _ear.pressed = True
        _thread.start_new_thread(_remind, (_ear,))  # not threading's: its locks may be held where the signal came
    if not _ear.held and not _under_way(sys.exc_info()[1]):
        raise KeyboardInterrupt


def _remind(ear: _Ear) -> None:
    while True:
        time.sleep(EVERY)
        if not ear.listening:
            return
        _thread.interrupt_main(signal.SIGINT)


def _under_way(e: BaseException | None) -> bool:
    """Is an exception being handled that came of Ctrl-C? Then whoever cleans up is not to be disturbed."""
    while e is not None and not isinstance(e, KeyboardInterrupt):
        e = e.__context__
    return e is not None


def _not_told_when_swallowed(told: Any) -> None:
    if not isinstance(told.exc_value, KeyboardInterrupt):
        _ear.unraisable(told)
