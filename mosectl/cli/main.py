"""One run of the command line: its streams, signals and warnings, and every error as one message and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import warnings
from typing import Any

import typer

from mosectl.cli.app import app
from mosectl.cli.params import Interrupted
from mosectl.errors import MosectlError, Notice, OutputError, UsageError, debugging
from mosectl.text.shown import guard_streams


def _shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings as a line, others as Python has them."""
    from mosectl.render import console

    if issubclass(category, Notice):
        console.warn("note", f": {message}")
    else:
        console.warning(message, category, *where[:2])


def _quiet_libraries() -> None:
    """What libraries tell their own developers is not for users, who can do nothing about it."""
    if not debugging():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)


def _own_output() -> None:
    """Keep standard output for results: what libraries in C print there (LAPACK's messages) goes to standard error."""
    out: Any = sys.stdout
    theirs: Any = sys.__stdout__
    try:
        if out is None or out is not theirs or out.fileno() != 1:
            return
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):  # closed, or not a file
        return
    # Python's own print goes where it went.
    sys.stdout = open(kept, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115


def main() -> None:
    """Run a command; every error becomes one message and a documented exit code."""
    _own_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are cleaned up
    warnings.showwarning = _shown
    warnings.simplefilter("always", Notice)
    _quiet_libraries()
    guard_streams()
    pressed: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        code = app(standalone_mode=False)  # typer turns Exit and Ctrl-C into a returned code
        if code == 130:
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told
        _no_more_interrupts()
        sys.exit(code or 0)
    except BaseException as e:
        # Libraries that are being imported turn Ctrl-C into errors of their own.
        code = _failed(KeyboardInterrupt() if pressed and not isinstance(e, Interrupted) else e)
        _no_more_interrupts()
        sys.exit(code)


def _no_more_interrupts() -> None:
    """The result is out, or the interruption told: what comes is the way out, with the exit code that was said.

    Python ends itself by the same signal at the very end where it once came upon code that a library ran from a text.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})


def _drop_stdout() -> None:
    """What is still in its buffer cannot be written; Python would try again on the way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(e: BaseException) -> int:
    from mosectl.render import console

    if isinstance(e, SystemExit):
        return 141 if e.code == 1 else int(e.code or 0)  # 1: how rich leaves when the reader closes the pipe
    if isinstance(e, KeyboardInterrupt | typer.Abort):
        console.interrupted()
        return 130
    if isinstance(e, Interrupted):
        console.interrupted(e.kept, e.fix)
        return 130
    invalid = isinstance(e, OSError) and e.filename is None and e.errno == errno.EINVAL
    if isinstance(e, BrokenPipeError) or (sys.platform == "win32" and invalid):  # what Windows calls a closed pipe
        _drop_stdout()
        return 141
    if isinstance(e, OSError) and e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _drop_stdout()
        e = OutputError(f"cannot write: {e.strerror}", where="standard output", fix="free some space")
    if debugging():
        raise e
    if type(e).__name__ == "OutOfMemoryError":
        e = UsageError(
            "out of GPU memory",
            fix="try --dtype bfloat16, or --device cpu",
        )
    if hasattr(e, "format_message"):  # typer's own usage errors
        if not e.format_message():  # no arguments at all: the help was shown
            return 2
        e = UsageError(e.format_message(), fix="see --help")
    console.error(e)
    return e.exit_code if isinstance(e, MosectlError) else 1
