"""Writing files so that a reader sees the old one or the new one, never a half."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mosectl.errors import OutputError


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


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder beside ``path`` and move it there in one step when the block ends well.

    Args:
        replace: ``path`` exists and is exchanged with the new folder; the old one is deleted afterwards.
    Raises:
        OutputError: ``path`` exists (and replace is False), or cannot be written.
    """
    path = path.absolute()
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError("the output exists", where=str(path), fix="choose another -o, or delete it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            fsync_folder(temporary)
            if replace:
                _exchange(temporary, path)  # the temporary name now holds the old folder
            else:
                temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


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


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a large weight file where the disk allows it, copy everything else.

    Small files (config, tokenizer) are copied because people edit them in place.
    """
    source = source.resolve()
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
