"""The doors through which files come in: regular files of bounded size, strict JSON, safetensors headers.

A file may come from a stranger. What is refused here is refused before it is read: no pipe that never ends, no device, no
size beyond reason, no JSON that two readers would understand differently or that overflows what is done with it later.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mosectl.errors import MosectlError

MAX_JSON = 100_000_000  # bytes; also what safetensors allows a header
MAX_DEPTH = 64  # nesting of JSON; what is written later needs a stack frame or two a level
MAX_DIGITS = 20  # of an integer: 64 bits
MAX_VALUES = 5_000_000  # in one JSON text: two bytes of it can take a hundred of memory
OUT_OF_REACH = {
    "FileNotFoundError": "no such file",
    "PermissionError": "may not be read",
    "IsADirectoryError": "is a folder",
}


@contextmanager
def opened(path: str | Path, error: type[MosectlError], fix: str, limit: int | None = None) -> Iterator[BinaryIO]:
    """A regular file, open for reading; never waits for a pipe.

    Args:
        limit: bytes that the file may have.
    Raises:
        error: there is no such file, it may not be read, is not a regular file, or is too large; ``fix`` is the next step.
    """
    try:
        # A name with NUL raises ValueError; without O_NONBLOCK opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as e:
        what = OUT_OF_REACH.get(type(e).__name__) or f"cannot be read: {getattr(e, 'strerror', None) or e}"
        raise error(what, where=str(path), fix=fix) from e
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (limit is not None and status.st_size > limit):
        os.close(descriptor)
        what = "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file (a pipe, device or socket)"
        if stat.S_ISREG(status.st_mode):
            what = f"has {status.st_size:,} bytes, at most {limit:,} are read"
        raise error(what, where=str(path), fix=fix)
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: str | Path, error: type[MosectlError], fix: str, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        error: as :func:`opened`.
    """
    with opened(path, error, fix, limit) as file:
        return file.read(limit + 1)


def read_json(path: str | Path, error: type[MosectlError], fix: str, *, special: bool = False) -> Any:
    """A JSON file, by the rules of :func:`parse_json`.

    Raises:
        error: as :func:`opened`, or the file is not JSON by these rules.
    """
    try:
        return parse_json(read_bytes(path, error, fix), special=special)
    except ValueError as e:
        raise error(f"damaged: {e}", where=str(path), fix=fix) from e


def parse_json(raw: bytes | str, *, special: bool = False, nan_is_null: bool = False) -> Any:
    """Strict JSON: UTF-8, no name twice in an object, nesting up to MAX_DEPTH, integers of 64 bits, no half characters,
    MAX_VALUES values.

    Args:
        special: allow NaN, infinite numbers and integers of 40 digits, which models' configurations hold: in many,
            model_max_length is int(1e30).
        nan_is_null: read NaN as null: so tables are written where a cell is empty.
    Raises:
        ValueError: with the reason in few words.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise ValueError(f"holds more than {MAX_VALUES:,} values")
        value = json.loads(text, object_pairs_hook=_unique, **_numbers(special, nan_is_null))
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 (byte {e.start})") from e
    except RecursionError as e:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from e
    _check_values(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the name '{twice[:60]}' stands twice in one object")
    return out


def _numbers(special: bool, nan_is_null: bool) -> dict[str, Any]:
    """The arguments of json.loads that say how numbers are read."""

    def constant(name: str) -> float | None:
        if nan_is_null and name == "NaN":
            return None
        if not special:
            raise ValueError(f"{name} is not a number")
        return float(name)

    def finite(text: str) -> float:
        if not special and not math.isfinite(float(text)):
            raise ValueError(f"{text[:30]} is out of range")
        return float(text)

    def integer(text: str) -> int:
        if len(text.lstrip("-")) > (2 * MAX_DIGITS if special else MAX_DIGITS):
            raise ValueError(f"an integer of {len(text)} digits")
        return int(text)

    return {"parse_constant": constant, "parse_float": finite, "parse_int": integer}


def _check_values(value: Any) -> None:
    """Depth and text of parsed JSON. Raises ValueError."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for x in level:
            if isinstance(x, str) and not x.isascii():
                x.encode("utf-8")  # half a character raises UnicodeEncodeError, a ValueError
            elif isinstance(x, dict):
                below += [*x.keys(), *x.values()]
            elif isinstance(x, list):
                below += x
        depth += any(isinstance(x, dict | list) for x in level)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        level = below


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of an open safetensors file as JSON, and where the tensors' bytes begin.

    Names, types and offsets are not checked here beyond being JSON.

    Raises:
        ValueError: not a safetensors file, or cut short; with the reason.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(MAX_JSON, size - 8):
        raise ValueError("not a safetensors file, or cut short")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length
