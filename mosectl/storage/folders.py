"""Model folders: built beside where they belong and moved there in one step; what they hold linked, copied or carried over.

A folder in the making lies in a private folder (places.py), beside a note of what it is for and which of its files are
finished: a killed process's work is gone on with where it is the same work.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mosectl.errors import ModelError, Notice, OutputError
from mosectl.storage import interrupts
from mosectl.storage.atomic import exclusive, fsync_folder, like, output_errors
from mosectl.storage.inputs import opened
from mosectl.storage.locks import locked
from mosectl.storage.places import (
    EXCHANGE,
    NEW,
    OLD,
    OWN,
    half_exchanged,
    is_private,
    leftovers,
    private_folder,
    remove,
    renameat2,
)

FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file
PLAN, DONE = "plan", "done"  # inside the private folder: what is built there, and which files of it are finished


@contextmanager
def claimed(path: Path, *, replace: bool = False) -> Iterator[None]:
    """Nobody else writes the folder ``path`` while the block runs; what a killed process has left of it is put right.

    Args:
        replace: the folder exists and will be exchanged.
    Raises:
        OutputError: it exists (and replace is False), cannot be written, or another process is writing it.
    """
    path = path.absolute()
    _check_folder(path, replace)
    with locked(path):
        with output_errors(path):
            recover(path)
        _check_folder(path, replace)
        yield


def check_new_folder(path: Path) -> None:
    """May a new folder become ``path``? :func:`claimed` asks it too; here it is asked before longer work.

    Raises:
        OutputError.
    """
    _check_folder(path.absolute(), replace=False)


def _check_folder(path: Path, replace: bool) -> None:
    with output_errors(path):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if not replace and (not stat.S_ISDIR(status.st_mode) or any(path.iterdir())):
            raise _exists(path)
    if replace and not os.access(path, os.W_OK):
        raise OutputError("the folder is read-only", where=str(path), fix=f"chmod u+w {path}, or give -o")


@contextmanager
def built(path: Path, *, replace: bool = False, plan: str = "", rights: Path | None = None) -> Iterator[Path]:
    """Build a folder beside the :func:`claimed` ``path`` and move it there in one step when the block ends well.

    What a killed process has left is handed over again where it was made by the same ``plan``, and deleted otherwise.

    Args:
        replace: ``path`` is exchanged with the new folder; the old one is deleted afterwards.
        rights: a folder whose mode the new one gets, within the umask and writable to its owner.
    Raises:
        OutputError.
    """
    path = path.absolute()
    with output_errors(path):
        place = _place(path, plan)
    try:
        new = place / NEW
        with output_errors(path):
            mode = stat.S_IMODE(rights.stat().st_mode) & 0o777 if rights else 0o777
            if not new.is_dir():
                new.mkdir(mode | 0o700)
            (place / PLAN).write_text(plan, "utf-8")
        yield new
        with interrupts.publishing(path), output_errors(path):
            for own in (PLAN, DONE):  # from here on nothing is to be gone on with
                (place / own).unlink(missing_ok=True)
            if path.exists():
                like(path, new)
            if not replace:
                new.chmod(stat.S_IMODE(new.stat().st_mode) | 0o700)
            fsync_folder(new)
            _exchange(new, path) if replace else _move(new, path)
            fsync_folder(path.parent)
    finally:
        if not half_exchanged(place):
            remove(place)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is built and moved to ``path``, which is claimed from the start.

    Raises:
        OutputError: as :func:`claimed`.
    """
    with claimed(path), built(path) as folder:
        yield folder


def finished(folder: Path) -> Path:
    """The list of what is finished in a folder that is being built."""
    return folder.with_name(DONE)


def _place(path: Path, plan: str) -> Path:
    """The private folder to build in: that of a killed process with the same plan, or a new one. Others are removed."""
    found = None
    for left in leftovers(path):
        if found is None and plan and _same(left, plan):
            found = left
        else:
            remove(left)
    return found or private_folder(path)


def _same(place: Path, plan: str) -> bool:
    """Was it begun by the same plan? Then all but what its list names is removed from it: that may be half-written."""
    if not is_private(place):
        return False
    try:
        if (place / PLAN).read_text("utf-8") != plan:
            return False
        done = (place / DONE).read_text("utf-8", "replace")
        for entry in os.scandir(place / NEW):
            if not entry.is_file(follow_symlinks=False) or f'"{entry.name}"' not in done:
                remove(Path(entry.path))
    except (OSError, UnicodeDecodeError):
        return False
    return True


def recover(path: Path) -> None:
    """Put a folder back that a killed exchange has left nowhere. ``path`` is locked."""
    for left in leftovers(path, exchanged=True):
        if os.path.lexists(path):
            what = (
                f"{left / OLD} is what {path.name} was before an interrupted run; it is kept, as there is another now"
            )
            warnings.warn(what, Notice, stacklevel=2)
        else:
            (left / OLD).rename(path)
            remove(left)


def recovered(path: Path) -> None:
    """Let those who are about to read a folder find it, where a killed exchange has left it nowhere.

    Raises:
        OutputError: another process is at it.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: links in a circle
        path = path.resolve()
        if not path.exists() and leftovers(path, exchanged=True):
            with locked(path):
                recover(path)


def _exchange(new: Path, path: Path) -> None:
    """Swap two folders: in one system call on Linux and macOS; by two renames elsewhere, whose gap :func:`recover` mends."""
    if renameat2(new, path, EXCHANGE):
        return
    old = new.with_name(OLD)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if new.exists():
            old.rename(path)
        raise


def _move(new: Path, path: Path) -> None:
    try:
        new.rename(path)  # an empty folder may be there, nothing else
    except OSError as e:
        if not os.path.lexists(path):
            raise
        try:
            path.rmdir()  # Windows renames over nothing, an empty folder neither
        except OSError:
            raise _exists(path) from e
        new.rename(path)


def _exists(path: Path) -> OutputError:
    return OutputError("the output exists", where=str(path), fix="choose another -o, or delete it first")


# What a folder holds.


def linked(origin: Path, folder: Path, skip: Collection[str], copy: bool) -> list[tuple[Path, Path]]:
    """Make a model's folders again and hard-link its weights where the disk allows it (and ``copy`` is False).

    Links are followed where :func:`followed` says so. Other links, pipes and devices are left out, with a notice; so are
    names that mosectl gives to what it makes on the way.

    Args:
        skip: names in ``origin`` itself that are left out.
    Returns:
        What is still to be copied, (from, to): small files (people edit them in place) and what could not be linked.
    Raises:
        ModelError: a folder cannot be read.
    """
    rest, left = [], []
    for entry, at in _entries(origin, lambda at: str(at) in skip or OWN.fullmatch(at.name) is not None):
        target, path = folder / at, Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            target.mkdir(stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode) & 0o777 | 0o700, exist_ok=True)
            continue
        source = path if entry.is_file(follow_symlinks=False) else followed(path, origin)
        if source is None:
            left.append(str(at))
        elif copy or path.suffix != ".safetensors" or not _hard_linked(source, target):
            rest.append((source, target))
    if left:
        some = ", ".join(sorted(left)[:3]) + (", …" if len(left) > 3 else "")
        what = f"left out: {some}, being no regular file, or a link that leads out of {origin.name}"
        warnings.warn(what, Notice, stacklevel=2)
    return rest


def carried(origin: Path, folder: Path, skip: Callable[[Path], bool]) -> None:
    """Give ``folder`` all that ``origin`` holds besides what ``skip`` says of a relative path, and what it has already.

    Hard links, so that both folders have it until one is deleted; links stay links. Copies where the disk has no links.
    """
    folders = []
    for entry, at in _entries(origin, skip):
        path, target = Path(entry.path), folder / at
        if entry.is_dir(follow_symlinks=False):
            target.mkdir(exist_ok=True)
            folders.append((path, target))
        elif os.path.lexists(target):
            continue
        elif entry.is_symlink():
            target.symlink_to(path.readlink())
        elif not _hard_linked(path, target) and entry.is_file(follow_symlinks=False):
            clone(path, target)
            like(path, target)
    for path, target in reversed(folders):  # once they are filled: some may be read-only
        like(path, target)


def _entries(
    folder: Path, skip: Callable[[Path], bool], inside: Path = Path()
) -> Iterator[tuple[os.DirEntry[str], Path]]:
    """What a folder and those in it hold, with the relative path, a folder before its content; no link is followed."""
    try:
        found = sorted(os.scandir(folder / inside), key=lambda e: e.name)
    except OSError as e:
        fix = "make it readable, or move it out of the model folder"
        raise ModelError(f"cannot be read: {e.strerror}", where=str(folder / inside), fix=fix) from e
    for entry in found:
        if not skip(at := inside / entry.name):
            yield entry, at
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder, skip, at)


def followed(link: Path, origin: Path) -> Path | None:
    """The regular file that a link in a model folder leads to, if it stays in there, or in the same model's Hub cache."""
    home = origin.resolve()
    try:
        target = link.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError):  # RuntimeError: in a circle
        return None
    cached = (p for p in home.parents if p.name == "snapshots" and re.match("models--.", p.parent.name))
    places = [home, *(p.parent / "blobs" for p in cached)]
    return target if regular and any(target.is_relative_to(p) for p in places) else None


def _hard_linked(source: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)  # of a start before; it may be the same file by another name
    with contextlib.suppress(OSError):
        os.link(source, target)
        return True
    return False


def clone(source: Path, target: Path) -> None:
    """A copy with a life of its own: by reference where the file system can (Btrfs, XFS, bcachefs), else byte by byte.

    It has the source's mode, within the umask and writable to its owner.

    Raises:
        ModelError: the source cannot be read.
    """
    target.unlink(missing_ok=True)
    with opened(source, ModelError, "see that the model is all there and may be read") as a:
        mode = stat.S_IMODE(os.fstat(a.fileno()).st_mode) & 0o777
        with exclusive(target, mode | 0o600) as b:
            if not _by_reference(a.fileno(), b.fileno()):
                shutil.copyfileobj(a, b, 2**24)


def _by_reference(source: int, target: int) -> bool:
    """Let an open file share another's blocks; False where the system or the disk cannot."""
    try:
        import fcntl

        fcntl.ioctl(target, FICLONE, source)
    except (ImportError, OSError):
        return False
    return True
