"""The lock beside an output: a small file, held as long as its process lives.

filelock asks the system for the lock (flock, or LockFileEx on Windows). The file is opened and deleted here: FileLock looks
less closely at what is there, and leaves it behind. Where the system or the disk knows no locks, a second file says which
process holds it (SoftFileLock).
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout, lock_descriptor

from mosectl.errors import Notice, OutputError
from mosectl.storage.atomic import open_no_link, ours, output_errors, short

LOCK, HOLDER = ".mosectl.lock", ".pid"


@contextmanager
def locked(path: Path, output: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing ``path`` at the same time; a killed one's lock is free again by itself.

    Folders above ``path`` are made, and removed again if the block fails and they are empty; else a notice tells of those
    that nobody asked for.

    Args:
        output: what the user has named, where that is not ``path`` but a folder above it.
    Raises:
        OutputError: another process holds it, or there is no writing there.
    """
    path = path.absolute()
    name = path.with_name(f".{short(path.name)}{LOCK}")
    made: list[Path] = []
    try:
        with output_errors(path):
            made += [p for p in path.parents if not p.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            held = _lock(name, path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                name.unlink()
            held.close()
            if sys.platform == "win32":  # which deletes no open file: what goes now, nobody holds
                with contextlib.suppress(OSError):
                    name.unlink()
    except BaseException:
        with contextlib.suppress(OSError):  # not there, or not empty
            for folder in made:
                folder.rmdir()
        raise
    if beside := [str(folder) for folder in made if folder in (output or path).absolute().parents]:
        warnings.warn(f"made the folder {beside[0]}, which was not there", Notice, stacklevel=3)


def _lock(name: Path, path: Path) -> ExitStack:
    """Hold the lock file ``name`` until what is returned is closed."""
    while True:
        with ExitStack() as held:
            try:
                descriptor = _opened(name, path)
                held.callback(os.close, descriptor)
                _take(held, descriptor, name, path)
                if os.path.samestat(os.fstat(descriptor), name.lstat()):
                    return held.pop_all()
            except FileNotFoundError:  # its holder was done in between and deleted it
                if not name.parent.is_dir():
                    raise


def _opened(name: Path, path: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0)
    try:
        return open_no_link(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    try:
        descriptor = open_no_link(name, flags, 0o600)
        status = os.fstat(descriptor)
        if ours(status) and stat.S_ISREG(status.st_mode):
            return descriptor
        os.close(descriptor)
    except PermissionError:
        pass
    what = f"{name.name} beside it is another user's, or no lock"
    raise OutputError(what, where=str(path), fix="delete it if no mosectl is running there, or choose another place")


def _take(held: ExitStack, descriptor: int, name: Path, path: Path) -> None:
    """Take the lock on an open file. Raises OutputError: another process has it."""
    fix = "wait for it, or choose another place"
    try:
        taken = lock_descriptor(descriptor, blocking=False)
    except OSError:  # the system or the disk knows no locks
        holder = SoftFileLock(name.with_name(name.name + HOLDER), timeout=0)
        fix += f"; if none is running, on another computer neither, delete {name.name}{HOLDER}"
        try:
            holder.acquire()
            held.callback(holder.release)
            taken = True
        except Timeout:
            taken = False
    if not taken:
        raise OutputError("another mosectl process is writing there", where=str(path), fix=fix)
