"""Writing files so that a reader sees the old one or the new one, never a half."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mosectl.errors import OutputError

FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, fsync, give it the umask's rights, rename.

    Raises:
        OutputError: no space, no right to write, the folder cannot be made, or ``path`` is a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise OutputError("is not a regular file", where=str(path), fix="give a file name, e.g. -o patch.safetensors")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file written by :func:`write_bytes`; same tensors and metadata give the same bytes."""
    write_bytes(path, save({k: v.contiguous() for k, v in sorted(tensors.items())}, metadata))


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing ``path`` into one clear OutputError."""
    remedies = {
        errno.ENOSPC: "free some space or choose another disk; nothing was changed",
        errno.EDQUOT: "free some space or choose another disk; nothing was changed",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder on a disk that is not read-only",
        errno.ENOTDIR: "a part of this path is a file: choose another path",
        errno.EISDIR: "this is a folder: give a file name",
    }
    try:
        yield
    except OSError as e:
        fix = remedies.get(e.errno or 0, "check the path and the disk; nothing was changed")
        raise OutputError(f"cannot write: {e.strerror or e}", where=str(path), fix=fix) from e


def stream_tensors(path: Path, shapes: Mapping[str, tuple[str, Sequence[int]]], read: Callable[[str], bytes]) -> None:
    """A safetensors file of tensors with these (dtype, shape) by name, one of them in memory at a time."""
    header, at = {}, 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    for name, (dtype, shape) in sorted(shapes.items()):
        size = sizes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in header:
            file.write(read(name))
        file.flush()
        os.fsync(file.fileno())


PLAN, DONE = (
    ".mosectl-plan",
    ".mosectl-done",
)  # inside a folder that is being built: what for, and which parts are finished


@contextmanager
def new_folder(path: Path, *, replace: bool = False, plan: str = "") -> Iterator[Path]:
    """Build a folder beside ``path`` and move it there in one step when the block ends well.

    What a killed process has left is handed over again where it was made by the same ``plan``, and deleted otherwise.

    Args:
        replace: ``path`` exists and is exchanged with the new folder; the old one is deleted afterwards.
    Raises:
        OutputError: ``path`` exists (and replace is False), cannot be written, or another process is writing it.
    """
    path = path.absolute()
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError("the output exists", where=str(path), fix="choose another -o, or delete it first")
    temporary = path.with_name(f".{path.name}.mosectl.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            yield from _built(path, temporary, replace, plan)


def _built(path: Path, temporary: Path, replace: bool, plan: str) -> Iterator[Path]:
    same = False
    with contextlib.suppress(OSError, UnicodeDecodeError):
        same = bool(plan) and (temporary / PLAN).read_text("utf-8") == plan
    if temporary.exists() and not same:
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(exist_ok=True)
        (temporary / PLAN).write_text(plan, "utf-8")
        yield temporary
        for own in (DONE, PLAN):
            (temporary / own).unlink(missing_ok=True)
        fsync_folder(temporary)
        if replace:
            _exchange(temporary, path)  # the temporary name now holds the old folder
        else:
            temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from building ``path`` at the same time; a killed one's lock is free again by itself."""
    name = path.with_name(f".{path.name}.mosectl.lock")
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(descriptor)
            what = "another mosectl process is writing there"
            raise OutputError(what, where=str(path), fix="wait for it, or choose another -o") from e
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == name.stat().st_ino:
                break
        os.close(descriptor)  # its holder was done and deleted it in between
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders: in one system call on Linux, by three renames where there is no such call."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None, use_errno=True)
            at_cwd, rename_exchange = -100, 2
            if libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange) == 0:
                return
    aside = a.with_name(a.name + ".old")
    b.replace(aside)
    a.replace(b)
    aside.replace(a)


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path, copy: bool = False) -> None:
    """Hard-link a large weight file where the disk allows it (and ``copy`` is False), copy everything else.

    Small files (config, tokenizer) are copied because people edit them in place.
    """
    source = source.resolve()
    target.unlink(missing_ok=True)  # of a start before; it may be the same file by another name
    if source.suffix == ".safetensors":
        if not copy:
            with contextlib.suppress(OSError):
                os.link(source, target)
                return
        clone(source, target)
        return
    shutil.copyfile(source, target)


def clone(source: Path, target: Path) -> None:
    """A copy with a life of its own: by reference where the file system can (Btrfs, XFS, bcachefs), else byte by byte."""
    target.unlink(missing_ok=True)
    with source.open("rb") as a, target.open("xb") as b, contextlib.suppress(OSError):
        fcntl.ioctl(b.fileno(), FICLONE, a.fileno())
        return
    shutil.copyfile(source, target)
