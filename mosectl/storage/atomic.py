"""Writing files so that a reader sees the old one or the new one, never a half."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mosectl.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_SPACE = "free some space or choose another disk; nothing was changed"
_ELSEWHERE = "choose a folder you may write to (-o)"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENOTDIR: "a part of this path is a file: choose another path",
    errno.EISDIR: "this is a folder: give a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link stands where mosectl writes: delete it, or choose another place",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing ``path`` into one clear OutputError."""
    try:
        yield
    except OSError as e:
        inside = Path(os.fsdecode(e.filename)) if isinstance(e.filename, str | bytes) else None
        what, fix = f"cannot write: {e.strerror or e}", _REMEDIES.get(e.errno or 0, "check the path and the disk")
        if e.errno in (errno.EACCES, errno.EPERM):
            if inside is not None and os.access(path.absolute().parent, os.W_OK):  # the cause lies further in
                what, fix = f"{what}: {inside}", "see who may write there"
            else:
                fix = _ELSEWHERE
        raise OutputError(what, where=str(path), fix=fix) from e
    except ValueError as e:  # a name with NUL
        if "null byte" not in str(e):
            raise
        raise OutputError(f"cannot write: {e}", where=repr(str(path)), fix="choose another name") from e


def short(name: str) -> str:
    """``name``, or a hash of one so long that nothing could be added to it (names have 255 bytes at most)."""
    raw = os.fsencode(name)
    return name if len(raw) <= 200 else hashlib.sha256(raw).hexdigest()[:32]


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, fsync, give it the rights of what it replaces, rename.

    Raises:
        OutputError: no space, no right to write, the folder cannot be made, or ``path`` is a folder or a device.
    """
    with output_errors(path):
        replaced = path.exists()
        if replaced and not path.is_file():
            what = "is not a regular file"
            raise OutputError(what, where=str(path), fix="give a file name, e.g. -o patch.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{short(path.name)}.{secrets.token_hex(4)}.tmp")
        try:
            with exclusive(temporary, 0o600 if replaced else 0o666) as file:
                file.write(data)
                if replaced:
                    like(path, temporary)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file written by :func:`write_bytes`; same tensors and metadata give the same bytes."""
    from safetensors.torch import save

    write_bytes(path, save({k: v.contiguous() for k, v in sorted(tensors.items())}, metadata))


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


@contextmanager
def exclusive(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that nobody has made before, open for writing; what stands there, a link too, is an error."""
    with os.fdopen(open_no_link(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        yield file


TRIES = 100  # to open a file that others delete and make again


def open_no_link(path: Path, flags: int, mode: int) -> int:
    """os.open that follows no link at ``path``; where the system cannot be asked for that (Windows), by looking at it.

    Raises:
        OSError: ELOOP, a link is there.
    """
    if hasattr(os, "O_NOFOLLOW"):
        return os.open(path, flags | os.O_NOFOLLOW, mode)
    for _ in range(TRIES):
        if path.is_symlink():
            break
        descriptor = os.open(path, flags, mode)
        try:
            same = os.path.samestat(os.fstat(descriptor), path.lstat())
        except OSError:
            os.close(descriptor)
            raise
        if same:
            return descriptor
        os.close(descriptor)  # replaced in between: by a link, or by another process's file
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def ours(status: os.stat_result) -> bool:
    """Does it belong to this user? Windows does not tell: there, all does."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def append(path: Path, data: bytes) -> None:
    """Add to a regular file and make that last; a link is not written through.

    Raises:
        OutputError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_no_link(path, flags, 0o666), "ab") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OutputError("is not a regular file", where=str(path), fix="delete it, or choose another place")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def like(source: Path, target: Path) -> None:
    """Give a file or folder another's owner (where we may), extended attributes and mode."""
    status = source.stat()
    mode = stat.S_IMODE(status.st_mode)
    try:
        if hasattr(os, "chown"):
            os.chown(target, status.st_uid, status.st_gid)
    except OSError:
        mode &= 0o777  # no rights of a user or group that it does not belong to
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):
            for name in os.listxattr(source):
                with contextlib.suppress(OSError):
                    os.setxattr(target, name, os.getxattr(source, name))
    target.chmod(mode)


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
