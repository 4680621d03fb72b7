from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mosectl.errors import UsageError
from mosectl.storage.safe_yaml import MAX_NODES, MAX_YAML, read_yaml


def read(folder: Path, content: str | bytes) -> Any:
    file = folder / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(file, UsageError, "write it anew")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("", None),
        ("\ufeffa: [1, -2.5, true, null, 'x', é]\nb: {c: d}\n", {"a": [1, -2.5, True, None, "x", "é"], "b": {"c": "d"}}),
        ("a: 2026-01-02\nb: 2001-12-14t21:59:43.10-05:00\n", {"a": "2026-01-02", "b": "2001-12-14t21:59:43.10-05:00"}),
        ("a: 18446744073709551615", {"a": 2**64 - 1}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}}),
        ("x: &x [1]\ny: *x", {"x": [1], "y": [1]}),
        ("a: =\n", {"a": "="}),
        (f"a: {'word ' * 1000}", {"a": ("word " * 1000).strip()}),
    ],
)  # fmt: skip
def test_plain_values(tmp_path: Path, content: str, value: Any) -> None:
    assert read(tmp_path, content) == value


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
REFUSED = {
    "not UTF-8": (b"a: \xe9", "", "not UTF-8 text"),
    "UTF-16": ("a: 1".encode("utf-16"), "", "not UTF-8 text"),
    "syntax": ("a: [1\nb: 2", ":2", "expected"),
    "two documents": ("--- 1\n--- 2\n", ":2", "another document"),
    "a function": ("a: 1\nb: !function os.system\n", ":2", "the tag !function is refused"),
    "an object": ("!!python/object/apply:os.system [id]", ":1", "the tag !!python/object/apply:os.system is refused"),
    "binary": ("!!binary aGk=", ":1", "refused"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", ":3", "the key 'a' stands twice"),
    "a key twice in other words": ('1: 1\n"b": 2\n0x1: 3\n', ":3", "the key '1' stands twice"),
    "a key that is a list": ("{[1, 2]: 3}", ":1", "unhashable key"),
    "a bomb": (BOMB, ":6", "more than 100,000 values"),
    "a bomb of merges": ("a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
                         ":14", "more than 100,000 values"),
    "an alias of itself": ("a: &a [*a]", ":1", "an alias stands inside"),
    "digits": ("a: " + "9" * 5000, ":1", "out of range"),
    "66 bits": ("a: 36893488147419103232", ":1", "out of range"),
    "infinite": ("a: 1\nb: .inf", ":2", "out of range"),
    "beyond a float": ("a: 1.0e+999", ":1", "out of range"),
    "no truth value": ("a: !!bool x", ":1", "not what its tag says"),
    "no digits": ('a: !!int ""', ":1", "not what its tag says"),
    "half a character": ('a: "\\ud800"', ":1", "half a character"),
    "half a character in a key": ('"\\ud800": 1', ":1", "half a character"),
    "beyond Unicode": ('a: "\\U00110000"', "", "does not exist"),
    "a control character": ("a: 1\nb: \x1b[2J", ":2", "the control character 0x1b"),
    "depth": ("[" * 90_000, ":1", "nested deeper than 64"),
    "depth of blocks": ("- " * 40_000, ":1", "nested deeper than 64"),
    "too large": ("#" * (MAX_YAML + 1), "", "at most 100,000"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told_with_its_line(tmp_path: Path, what: str) -> None:
    content, line, message = REFUSED[what]
    start = time.monotonic()
    with pytest.raises(UsageError) as told:
        read(tmp_path, content)
    assert told.value.where == f"{tmp_path / 'a.yaml'}{line}"
    assert message in told.value.what
    assert told.value.fix == "write it anew"
    assert time.monotonic() - start < 10


def test_files_that_are_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path, what in ((tmp_path / "none.yaml", "no such file"), (pipe, "not a regular file"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=what):
            read_yaml(path, UsageError, "check the path")


def test_the_slowest_take_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    assert len(read(tmp_path, "[" + "a," * (MAX_YAML // 2 - 1) + "]")) < MAX_NODES
    assert time.monotonic() - start < 10
