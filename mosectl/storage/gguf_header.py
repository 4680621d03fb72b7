"""What a GGUF file says of itself, read and checked before any other program reads it: metadata, tensors, their places.

The format (version 2 and 3, little-endian): https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mosectl.errors import ModelError, UsageError
from mosectl.storage.inputs import opened

MAGIC, SUFFIX = b"GGUF", ".gguf"
MAX_FIELDS, MAX_TENSORS, MAX_DIMS = 100_000, 1_000_000, 4
MAX_TEXT = 10_000_000  # bytes of one string of the metadata; chat templates have some thousand
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FIX = "fetch the file again"


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a GGUF file that is all there."""

    fields: Mapping[str, Any]  # numbers and strings; of an array its length
    kinds: Mapping[str, str]  # tensor name → ggml's type, such as Q4_K
    elements: int  # of all tensors together

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.fields["general.architecture"])

    @property
    def is_model(self) -> bool:
        """Is it a language model, and not an adapter or a vision projector?"""
        return self.fields.get("general.type", "model") == "model" and self.architecture != "clip"

    def count(self, key: str) -> int:
        """A number of the architecture's, such as block_count; 0 where there is none."""
        value = self.fields.get(f"{self.architecture}.{key}", 0)
        return value if type(value) is int else 0


def is_gguf(path: Path) -> bool:
    """Is it a file that is named, or begins, like a GGUF file? (Ollama's have no suffix.) Opens regular files only."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        ModelError: it is no GGUF file, is damaged or cut short. UsageError: the package gguf is missing.
    """
    sizes = _type_sizes(path)
    with opened(path, ModelError, _FIX) as file:
        reader = _Reader(file, path.stat().st_size)
        try:
            return _header(reader, sizes)
        except (ValueError, UnicodeDecodeError, struct.error) as e:
            raise ModelError(f"damaged GGUF file: {e}", where=str(path), fix=_FIX) from e


def _type_sizes(path: Path) -> dict[int, tuple[str, int, int]]:
    """ggml type → its name, elements and bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as e:
        what = "to read a GGUF file takes the package gguf"
        raise UsageError(what, where=str(path), fix='pip install "mosectl[gguf]"') from e
    return {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}


@dataclass
class _Reader:
    """A file that is never read beyond its end."""

    file: BinaryIO
    size: int

    def bytes(self, count: int) -> bytes:
        found = self.file.read(count) if count <= self.size - self.file.tell() else b""
        if len(found) != count:
            raise ValueError("it is cut short")
        return found

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("it is cut short")
        self.file.seek(count, 1)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_TEXT:
            raise ValueError(f"a text of {length:,} bytes")
        return self.bytes(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown kind {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(length):  # ends with the file at the latest
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"a list of the unknown kind {inner}")
        return length


def _header(reader: _Reader, sizes: Mapping[int, tuple[str, int, int]]) -> Header:
    if reader.bytes(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensors, fields = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not read, only 2 and 3 (little-endian)")
    if tensors > MAX_TENSORS or fields > MAX_FIELDS:
        raise ValueError(f"{tensors:,} tensors and {fields:,} fields are more than any model has")
    known: dict[str, Any] = {}
    for _ in range(fields):
        name = reader.text()
        known[name] = reader.value(reader.number("I"))
    if not isinstance(known.get("general.architecture"), str):
        raise ValueError("it does not say its architecture")
    kinds: dict[str, str] = {}
    ends, elements = [0], 0
    for _ in range(tensors):
        name = reader.text()
        if name in kinds:
            raise ValueError(f"two tensors are called {name!r:.80}")
        kinds[name], count, end = _tensor(reader, sizes)
        elements += count
        ends.append(end)
    align = known.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError("its alignment is not a positive number")
    start = -(-reader.file.tell() // align) * align
    if tensors and start + max(ends) > reader.size:
        missing = start + max(ends) - reader.size
        raise ValueError(f"it is cut short, {missing:,} bytes are missing")
    return Header(known, kinds, elements)


def _tensor(reader: _Reader, sizes: Mapping[int, tuple[str, int, int]]) -> tuple[str, int, int]:
    """One tensor's type, its number of elements, and where it ends, from the beginning of the data."""
    dims = reader.number("I")
    if dims > MAX_DIMS:
        raise ValueError(f"a tensor of {dims} dimensions")
    count = 1
    for _ in range(dims):
        count *= reader.number("Q")
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in sizes:
        raise ValueError(f"a tensor of the unknown type {kind}; a newer package gguf may know it")
    name, elements, size = sizes[kind]
    return name, count, offset + -(-count // elements) * size
