"""Imported before mosectl: this interpreter then lacks what Windows lacks, and files behave as they do there.

What cannot be had here is the system itself: paths, encodings and the real LockFileEx are those of Linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # noqa: F401  (its part for Linux needs what is taken away)

for name in [n for n in sys.modules if n.partition(".")[0] == "filelock"]:
    del sys.modules[name]  # it is to look again at what there is
sys.modules["fcntl"] = sys.modules["resource"] = None  # type: ignore[assignment]
MISSING = {
    os: "O_NOFOLLOW O_DIRECTORY O_NONBLOCK fchmod fchown chown lchown mkfifo geteuid getuid getegid posix_fallocate "
    "listxattr getxattr setxattr killpg setsid",
    signal: "SIGALRM alarm setitimer getitimer ITIMER_VIRTUAL SIGVTALRM pthread_sigmask SIGPIPE SIGHUP",
}
mkfifo = os.mkfifo  # for cases that put one in the way all the same
for module, names in MISSING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
shutil._use_fd_functions = False  # type: ignore[attr-defined]


def in_use(path: str) -> list[str]:
    """Files at or below a path that this process has open or mapped."""
    here = os.path.realpath(path)
    used = [os.path.realpath(p) for p in Path("/proc/self/fd").iterdir()]
    used += [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    return [u for u in used if u == here or u.startswith(here + "/")]


def refusing(real: Callable[..., Any], over: bool) -> Callable[..., Any]:
    """A call that moves or deletes, refused for what is in use; and where something is there, unless it goes ``over`` it."""

    def call(*paths: Any, **more: Any) -> Any:
        names = [os.fsdecode(p) for p in paths]
        for name in names:
            if (used := in_use(name)) and ".mosectl.lock" not in name:  # filelock deletes its own open file on Linux
                raise PermissionError(13, f"in use: {used}", name)
        if not over and os.path.lexists(names[-1]):
            raise FileExistsError(17, "File exists", names[-1])
        return real(*paths, **more)

    return call


for name in ("unlink", "remove", "rmdir", "replace"):
    setattr(os, name, refusing(getattr(os, name), over=True))
os.rename = refusing(os.rename, over=False)
_open, _fsync, _mkdir = os.open, os.fsync, os.mkdir


def no_folders(path: Any, *args: Any, **more: Any) -> int:
    if os.path.isdir(path):  # noqa: PTH112
        raise PermissionError(13, "Permission denied", path)
    return _open(path, *args, **more)


def writable_only(descriptor: int) -> None:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    if int(flags, 8) & 3 == 0:
        raise OSError(9, "Bad file descriptor")
    assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
    _fsync(descriptor)


os.open, os.fsync = no_folders, writable_only
os.mkdir = lambda path, mode=0o777, **more: _mkdir(path, 0o777, **more)  # no folder is private by its mode

from mosectl.storage import places  # noqa: E402

places.ctypes = types.SimpleNamespace(CDLL=lambda *_, **__: object())  # type: ignore[attr-defined]  # no renameat2
