"""Beside an output while it is written: a lock (locks.py), and a private folder whose content is moved there at the end.

Strangers may write into the same folder (/tmp, a cluster's scratch disk). So what is made there has a random name, is made
exclusively and belongs to its maker alone; nothing is written through a link; only what is ours is gone on with or removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mosectl.errors import OutputError
from mosectl.storage import interrupts
from mosectl.storage.atomic import fsync_folder, like, ours, output_errors, short
from mosectl.storage.locks import locked

TEMPORARY = ".mosectl.tmp"
# Names that only mosectl gives, of this version and those before; never part of a model.
OWN = re.compile(r"\.mosectl-(plan|done)|\..*\.mosectl\.(tmp|lock)(\.old|\.pid(\..+)?)?|\..+\.[0-9a-f]{8}\.tmp")
NEW, OLD = "new", "old"  # inside a private folder: what is made; and a folder that the new one takes the place of
MARGIN = 2**20  # bytes beyond what is asked for: records, folders
NOREPLACE, EXCHANGE = 1, 2  # linux/fs.h, for renameat2
MACOS = {NOREPLACE: 4, EXCHANGE: 2}  # sys/stdio.h, for renamex_np


@dataclass(frozen=True)
class Place:
    """Where a file is made before it is moved to where it belongs."""

    file: Path  # in a folder of its own
    final: Path

    @property
    def _held(self) -> Path:
        return self.file.parent.with_name("held")

    def reserve(self, size: int) -> None:
        """Hold ``size`` bytes of the disk until the file is written: a full disk is met before the work, not after it.

        Raises:
            OutputError: they are not free.
        """
        check_room(self.file.parent, size, self.final)
        with output_errors(self.final), self._held.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size + MARGIN)
            except (AttributeError, OSError) as e:
                if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise  # others: a system or a disk that can hold nothing

    def ready(self) -> Path:
        """The path to write to now; what was held for it is free again."""
        self._held.unlink(missing_ok=True)
        return self.file


def check_room(folder: Path, size: int, final: Path) -> None:
    """Raises OutputError where the disk of ``folder``, in which ``final`` is made, has no room for ``size`` bytes."""
    with output_errors(final):
        free = shutil.disk_usage(folder).free
    if free < size + MARGIN:
        needs = f"needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise OutputError(needs, where=str(final), fix="free some space, or choose another disk")


@contextmanager
def new_file(
    path: Path, *, overwrite: bool = False, option: str = "-o", reads: Iterable[str | Path | None] = ()
) -> Iterator[Place]:
    """A place to make a file in, which is moved to ``path`` in one step when the block ends well.

    ``path`` is ours from the start: another process that is to write it is refused before its work, not after.

    Args:
        overwrite: a file there is replaced, by one with its mode, owner and attributes.
        option: of the command line, for messages.
        reads: files and folders that the work reads, which no ``overwrite`` replaces.
    Raises:
        OutputError: ``path`` exists, is no regular file, cannot be written, or another process is writing it.
    """
    path = path.absolute()
    check_new(path, overwrite, option)
    check_apart(path, reads, option)
    with locked(path):
        check_new(path, overwrite, option)
        with output_errors(path):
            for left in leftovers(path):
                remove(left)
            folder = private_folder(path)
        try:
            (folder / NEW).mkdir()  # in which no name is taken yet
            place = Place(folder / NEW / path.name, path)
            place.reserve(0)
            yield place
            with interrupts.publishing(path), output_errors(path):
                _publish(place.ready(), path, overwrite)
        finally:
            remove(folder)


def check_new(path: Path, overwrite: bool, option: str = "-o") -> None:
    """May ``path`` become a new file? Raises OutputError."""
    with output_errors(path):
        try:
            path.lstat()
        except FileNotFoundError:
            return
        if path.exists() and not path.is_file():
            raise OutputError("is not a regular file", where=str(path), fix=f"give a file name after {option}")
    if not overwrite:
        raise _exists(path, option)


def check_apart(path: Path, reads: Iterable[str | Path | None], option: str) -> None:
    """Refuse to replace what the work reads: a file, or one in a folder. Raises OutputError."""
    with output_errors(path):
        if not path.exists():
            return
        for source in (Path(r) for r in reads if r):
            with contextlib.suppress(OSError, ValueError):  # a hub id, or a name that no file has
                if source.samefile(path) or (source.is_dir() and source.resolve() in path.resolve().parents):
                    what = f"lies in {source}, which" if source.is_dir() else "is a file that"
                    what += " this command reads: it would be lost"
                    raise OutputError(what, where=str(path), fix=f"choose another {option}")


def _exists(path: Path, option: str) -> OutputError:
    return OutputError("the output exists", where=str(path), fix=f"choose another {option}, or give --overwrite")


def _publish(file: Path, path: Path, overwrite: bool) -> None:
    with file.open("r+b") as made:  # Windows syncs only what may be written to
        os.fsync(made.fileno())  # whoever wrote it
    if overwrite:
        if path.exists():
            like(path, file)
        file.replace(path)
    else:
        try:
            _rename_new(file, path)
        except FileExistsError as e:
            spare = path.with_name(f"{path.stem}-{secrets.token_hex(4)}{path.suffix}")
            _rename_new(file, spare)
            what = "was made by something else in the meantime, and is left as it is"
            raise OutputError(what, where=str(path), fix=f"the result is in {spare}") from e
    fsync_folder(path.parent)


def _rename_new(a: Path, b: Path) -> None:
    """Rename a file, unless ``b`` exists (FileExistsError); in one step where the system or the disk can."""
    if renameat2(a, b, NOREPLACE):
        return
    try:
        os.link(a, b)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if os.path.lexists(b):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(b)) from None
        a.rename(b)


def renameat2(a: Path, b: Path, flags: int) -> bool:
    """Linux's rename with flags, or macOS's like it; False where the system or the disk has none.

    Raises:
        FileExistsError: NOREPLACE, and ``b`` exists.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        old, new, at_cwd = os.fsencode(a), os.fsencode(b), -100
        if sys.platform == "darwin":
            failed = libc.renamex_np(old, new, MACOS[flags])
        else:
            failed = libc.renameat2(at_cwd, old, at_cwd, new, flags)
        if not failed:
            return True
    except (AttributeError, OSError):  # an old libc
        return False
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(b))
    return False


def private_folder(path: Path) -> Path:
    """A new folder beside ``path`` that only we may enter."""
    return Path(tempfile.mkdtemp(prefix=f".{short(path.name)}.", suffix=TEMPORARY, dir=path.parent))


def leftovers(path: Path, *, exchanged: bool = False) -> list[Path]:
    """What killed processes have left beside ``path``, as far as it is ours. To be asked for by whoever has locked it.

    Args:
        exchanged: those, and only those, that hold the only copy of a folder that was to be exchanged.
    """
    name = re.escape(short(path.name))
    pattern = re.compile(
        rf"\.{name}(\.[a-z0-9_]{{8}})?{re.escape(TEMPORARY)}|\.{name}(\.progress)?\.[0-9a-f]{{8}}\.tmp"
    )
    found = []
    for entry in os.scandir(path.parent):
        with contextlib.suppress(FileNotFoundError):
            if pattern.fullmatch(entry.name) and ours(entry.stat(follow_symlinks=False)):
                found.append(Path(entry.path))
    return sorted(p for p in found if half_exchanged(p) == exchanged)


def half_exchanged(place: Path) -> bool:
    """Does a private folder hold what was to be replaced, and still what was to replace it?"""
    return is_private(place) and (place / OLD).is_dir() and (place / NEW).is_dir()


def is_private(folder: Path) -> bool:
    """A folder, not a link, that is ours and that nobody else may enter: what it holds is what we have put there.

    Windows tells neither whose it is nor who may enter: there, a folder that is no link.
    """
    with contextlib.suppress(OSError):
        status = folder.lstat()
        junction = getattr(status, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
        open_to_others = hasattr(os, "geteuid") and stat.S_IMODE(status.st_mode) & 0o077
        return stat.S_ISDIR(status.st_mode) and not junction and ours(status) and not open_to_others
    return False


def remove(path: Path) -> None:
    """Delete a file or a whole folder as far as possible, read-only folders in it too; links are not followed."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        for where, folders, _ in os.walk(path):
            for name in ("", *folders):
                inner = Path(where, name)
                if not inner.is_symlink() and not os.access(inner, os.W_OK | os.X_OK):
                    inner.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
