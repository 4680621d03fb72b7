"""Statistics kept between edits, one file a layer; an entry that is not as it was written is made again, and told."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from mosectl.errors import MosectlError, Notice, OutputError
from mosectl.model import distributed
from mosectl.model.edit_site import Projection
from mosectl.storage import schema
from mosectl.storage.atomic import ours, output_errors, write_bytes
from mosectl.storage.cache import FIX, cache_dir
from mosectl.storage.state_file import damaged, digest, read_state, write_state

KIND = "statistics"
Entry = Mapping[str, Tensor]  # C (p, p), G (d, d) float32; tokens int64, error float32: scalars


def cached(key: str, projections: Sequence[Projection]) -> dict[str, Entry]:
    """Every layer's entry by module path, or nothing where one is missing or must be made again."""
    found = {}
    for p in projections:
        path = path_of(key, p.name)
        if not os.path.lexists(path):
            return {}
        try:
            found[p.name] = _read(path, p)
        except OutputError as e:
            if distributed.first():
                warnings.warn(f"kept statistics are made again: {e.where}: {e.what}", Notice, stacklevel=2)
            return {}
    return found


def keep(key: str, entries: Mapping[str, Entry], strict: bool) -> None:
    """Write the entries, by module path.

    Raises:
        OutputError: they cannot be written, and ``strict``; else that is told.
    """
    try:
        for name, entry in entries.items():
            write_state(path_of(key, name), KIND, {"of": f"{key}-{name}"}, entry)
    except OutputError as e:
        if strict:
            raise
        what = f"the statistics cannot be kept, every edit computes them again: {e.where}: {e.what}; {FIX}"
        warnings.warn(what, Notice, stacklevel=2)


def check_writable() -> None:
    """Find out before the work, not after it.

    Raises:
        OutputError.
    """
    folder = cache_dir() / "stats"
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def remember_hash(folder: Path, weights: str) -> None:
    """The hash of the weights in a checkpoint folder, for who asks without loading them; nothing where it cannot be kept."""
    with suppress(OSError, MosectlError):
        (cache_dir() / "stats").mkdir(parents=True, exist_ok=True)
        write_bytes(_note(folder), weights.encode())


def known_hash(folder: Path) -> str:
    """The hash of the weights in a checkpoint folder, if its files are those an edit has seen; else nothing."""
    with suppress(OSError, ValueError, MosectlError):
        text = _note(folder).read_bytes()[:64].decode()
        return text if re.fullmatch(r"[0-9a-f]{32}", text) else ""
    return ""


def _note(folder: Path) -> Path:
    files = sorted(folder.resolve().glob("*.safetensors"))
    seen = [str(folder.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    return cache_dir() / "stats" / f"{digest(seen)[:32]}.weights"


def path_of(key: str, name: str) -> Path:
    """Where a layer's entry is kept."""
    return cache_dir() / "stats" / f"{key}-{name}.safetensors"


def _read(path: Path, p: Projection) -> Entry:
    record, entry = read_state(path, KIND, schema.record({"of": schema.text}), FIX, limit=4 * (p.p**2 + p.d**2) + 10**6)
    status = path.stat()
    if status.st_uid != 0 and not ours(status):  # in a folder open to others, anyone may have prepared it
        raise OutputError("belongs to another user", where=str(path), fix=FIX)
    forms = {
        "C": (torch.float32, (p.p, p.p)), "G": (torch.float32, (p.d, p.d)), "tokens": (torch.int64, ()),
        "error": (torch.float32, ()),
    }  # fmt: skip
    good = record["of"] == path.stem and {n: (x.dtype, tuple(x.shape)) for n, x in entry.items()} == forms
    if not good or not all(bool(x.isfinite().all() and (x.diagonal() >= 0).all()) for x in (entry["C"], entry["G"])):
        raise damaged(path, "its content is not what belongs there", FIX)
    return entry
