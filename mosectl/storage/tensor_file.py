"""Reading a safetensors file from a stranger: all of its header is checked before any of its tensors is read.

Only what patches and editors hold is taken: float32, no holes, no overlaps, nothing behind the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import psutil
import torch
from torch import Tensor

from mosectl.errors import PatchError
from mosectl.storage import schema
from mosectl.storage.inputs import opened, read_header

MAX_TENSORS = 4_096  # in one file; a patch has at most four a layer
MAX_SIZE = 2**18  # of a weight's side, of a rank; the widest FFNs known have 2**17
_BLOCK = 2**24  # numbers read and checked at once
_AGAIN = "fetch the file again"

_OFFSET = schema.within(0, 2**53)
_ENTRY = schema.record(
    {
        "dtype": schema.text,
        "shape": schema.listed(schema.within(1, 2 * MAX_SIZE), 1, 4),
        "data_offsets": schema.listed(_OFFSET, 2, 2),
    }
)

Rows = Callable[[str, Tensor], None]  # a tensor's name and some of its rows; raises PatchError


class Span(NamedTuple):
    """Where a tensor's bytes lie behind the header."""

    start: int
    stop: int
    shape: tuple[int, ...]


def header_of(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries of the tensors, metadata, and where the tensors' bytes begin.

    Raises:
        PatchError: not a safetensors file, or its header is damaged.
    """
    try:
        header, start = read_header(file)
        metadata = header.pop("__metadata__", {})
        schema.mapping(schema.text)(metadata)
    except schema.Misfit as e:
        raise PatchError(f"malformed: {e}", where="__metadata__", fix=_AGAIN) from e
    except ValueError as e:
        file.seek(0)
        if file.read(1) in (b"{", b"[", b"p"):  # JSON, or a CSV's "prompt"
            fix = "give a .safetensors file made by mosectl; facts go to mosectl edit"
            raise PatchError("a text file, such as facts, not a patch", fix=fix) from e
        fix = "give a file made by mosectl; fetch it again if it is one"
        raise PatchError(f"damaged: {e}", where="header", fix=fix) from e
    return header, metadata, start


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, be it cut short; empty where there is none."""
    try:
        with opened(path, PatchError, "") as file:
            return header_of(file)[1]
    except (OSError, PatchError):
        return {}


def layout(entries: Mapping[str, Any], data_size: int) -> dict[str, Span]:
    """Every tensor by name, in the order of its bytes.

    Args:
        data_size: bytes behind the header.
    Raises:
        PatchError: an entry is malformed, the tensors do not fill the file without hole or overlap, or there are too many.
    """
    if len(entries) > MAX_TENSORS:
        what = f"{len(entries):,} tensors, at most {MAX_TENSORS:,} are read"
        raise PatchError(what, where="header", fix="do not use this file")
    spans = {}
    for name, entry in entries.items():
        try:
            _ENTRY(entry)
        except schema.Misfit as e:
            raise PatchError(f"malformed tensor entry: {e}", where=name[:200], fix=_AGAIN) from e
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if entry["dtype"] != "F32":
            raise PatchError(f"must be F32, found {entry['dtype'][:20]} {shape}", where=name[:200], fix=_AGAIN)
        if stop - start != 4 * math.prod(shape):
            raise PatchError(f"data offsets {[start, stop]} do not fit shape {shape}", where=name[:200], fix=_AGAIN)
        spans[name] = Span(start, stop, tuple(shape))
    end, spans = 0, dict(sorted(spans.items(), key=lambda s: s[1]))
    for name, span in spans.items():
        if span.start != end:
            raise PatchError("tensors overlap or leave a hole", where=name[:200], fix="do not use this file")
        end = span.stop
    if end != data_size:
        raise PatchError(f"the file holds {data_size} bytes of tensors, its header says {end}", fix=_AGAIN)
    return spans


def _unchecked(name: str, rows: Tensor) -> None:
    """For files whose numbers may be any."""


def read(
    file: BinaryIO, start: int, spans: Mapping[str, Span], check: Rows = _unchecked
) -> Iterator[tuple[str, Tensor]]:
    """The tensors one after the other with their names, their numbers finite; ``check`` may refuse some rows of one before
    the next are read.

    Args:
        start: where the tensors' bytes begin.
    Raises:
        PatchError: of ``check``, a number is not finite, the file is cut short, or there is less memory than it takes.
    """
    needed, free = sum(s.stop - s.start for s in spans.values()), psutil.virtual_memory().available
    too_much = f"holds {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    fix = "close other programs, or use a machine with more memory"
    if needed > free:
        raise PatchError(too_much, fix=fix)
    for name, span in spans.items():
        file.seek(start + span.start)
        try:
            x = torch.empty(span.shape)  # takes memory only as it is filled
        except RuntimeError as e:  # a limit of the user's own (ulimit -v)
            raise PatchError(too_much, where=name, fix=fix) from e
        rows = x.view(-1, span.shape[-1])
        for part in rows.split(max(1, _BLOCK // span.shape[-1])):
            target = memoryview(part.numpy()).cast("B")  # type: ignore[arg-type]
            if file.readinto(target) != len(target):  # type: ignore[attr-defined]
                raise PatchError("the file is cut short", where=name, fix=_AGAIN)
            if not bool(torch.isfinite(part).all()):
                raise PatchError("holds NaN or infinite numbers", where=name, fix="do not use this file")
            check(name, part)
        yield name, x
