"""Checks of JSON values and what they say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mosectl.storage.schema import (
    Misfit,
    anything,
    flag,
    listed,
    mapping,
    matching,
    number,
    one_of,
    optional,
    record,
    scalar,
    text,
    within,
)

WORD = matching(re.compile("[a-z]+"), "a word")
SCHEMA = record({"name": text, "sizes": listed(within(1, 9), 2, 2)}, {"note": optional(WORD)}, others=scalar)
GOOD = {"name": "x", "sizes": [1, 9]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be an object, found a list of 0"),
        ({"name": "x"}, "fields missing or unknown: sizes"),
        ({**GOOD, "name": None}, "name: must be a text, found null"),
        ({**GOOD, "sizes": [1, 0]}, "sizes[1]: must be a whole number from 1 to 9, found 0"),
        ({**GOOD, "sizes": [1]}, "sizes: must be a list of 2, found a list of 1"),
        ({**GOOD, "sizes": [True, 1]}, "sizes[0]: must be a whole number from 1 to 9, found true"),
        ({**GOOD, "note": "1"}, "note: must be a word, found '1'"),
        ({**GOOD, "more": {}}, "more: must be a text, a number, true, false or null, found an object of 0"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(Misfit) as e:
        SCHEMA(value)
    assert str(e.value) == message


def test_what_fits() -> None:
    for check, values in (
        (SCHEMA, [GOOD, {**GOOD, "note": None}, {**GOOD, "note": "abc", "more": 1.5}]),
        (number, [1, 1.5, -(10**19)]), (flag, [True]), (one_of("a", 1), ["a", 1]), (listed(text), [[], ["a"]]),
        (mapping(number), [{}, {"a": 1}]), (anything, [None, {"a": [1]}]),
    ):  # fmt: skip
        for value in values:
            check(value)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (number, True, "must be a number, found true"),
        (one_of("a", 1), True, "true is not known, only 'a', 1"),
        (one_of("a"), ["a"], "a list of 1 is not known, only 'a'"),
        (listed(text, 1), [], "must be a list that is not empty, found a list of 0"),
        (listed(listed(text)), [["a"], ["b", 2]], "[1][1]: must be a text, found 2"),
        (
            mapping(listed(mapping(number))),
            {"a": [{}, {"b": "x" * 99}]},
            f"a[1].b: must be a number, found '{'x' * 60}'",
        ),
    ],
)
def test_more_that_does_not_fit(check: Any, value: Any, message: str) -> None:
    with pytest.raises(Misfit) as e:
        check(value)
    assert str(e.value) == message
