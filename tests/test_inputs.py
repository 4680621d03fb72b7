"""Files from anywhere: what may be read, and what is refused before it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mosectl.errors import ModelError
from mosectl.storage.inputs import MAX_DEPTH, opened, parse_json, read_bytes, read_header, read_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 100_000, "nested deeper"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper"),
        ("NaN", "NaN is not a number"),
        ("[1e999]", "out of range"),
        ("9" * 400, "400 digits"),
        ("9" * 5000, "5000 digits"),
        (r'{"\ud800": 1}', "surrogates"),
        (r'["\ud800"]', "surrogates"),
        (b"\xff", "not UTF-8"),
        ("{", "Expecting"),
        ("[" + "[]," * 5_000_000 + "1]", "more than 5,000,000 values"),
    ],
)
def test_json_that_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_that_is_taken() -> None:
    assert parse_json(b'{"a": [1, -2.5e3, null, true, "\xf0\x9f\xa6\x8a"]}') == {"a": [1, -2500.0, None, True, "🦊"]}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("[Infinity, 1e999]", special=True) == [float("inf")] * 2
    assert parse_json(str(2**64 - 1)) == 2**64 - 1
    assert parse_json(str(int(1e30)), special=True) == int(1e30)
    with pytest.raises(ValueError, match="41 digits"):
        parse_json("1" * 41, special=True)


def test_many_names_take_no_time() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="twice"):
        parse_json("{" + ",".join(f'"{i}": 1' for i in range(40_000)) + ', "39999": 2}')
    assert time.perf_counter() - start < 2


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 * 10**9)
    cases = [
        ("pipe", "not a regular file"), ("sparse", "20,000,000,000 bytes"), ("none", "no such file"), (".", "is a folder"),
        ("nul\0", "cannot be read"), ("x" * 300, "cannot be read"),
    ]  # fmt: skip
    for name, what in cases:
        with pytest.raises(ModelError, match=what):
            read_bytes(tmp_path / name, ModelError, "give another")
        if name != "sparse":
            with pytest.raises(ModelError, match=what), opened(tmp_path / name, ModelError, "give another"):
                pass
    with pytest.raises(ModelError, match="not a regular file"):
        read_json("/dev/zero", ModelError, "give another")
    for name, what in (("pipe", "not a regular file"), (".", "is a folder")):
        with pytest.raises(ModelError, match=what), opened(tmp_path / name, ModelError, "give another"):
            pass


def test_headers(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"

    def header(data: bytes) -> object:
        file.write_bytes(data)
        with opened(file, ModelError, "") as opened_file:
            return read_header(opened_file)

    assert header((2).to_bytes(8, "little") + b"{}") == ({}, 10)
    for data in (b"", b"\0" * 8, (3).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little") + b"{}"):
        with pytest.raises(ValueError, match="cut short"):
            header(data)
    with pytest.raises(ValueError, match="not a JSON object"):
        header((2).to_bytes(8, "little") + b"[]")
