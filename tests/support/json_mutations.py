"""JSON as a stranger may send it: a good document with a field or two replaced, taken away or put in."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from support.spoiling import EXAMPLES

# The same inputs at each run; deadlines are the test's own matter.
fuzzing = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2, 10**6, 10**9, 2**31, 2**63, 1e308, -0.0, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", ".", "..", "/", "../../etc/passwd", "\0", "\ud800", "x" * 5000, "me/model", "model.safetensors"]
    ),
    st.lists(st.integers() | st.text(max_size=5) | st.none(), max_size=4),
    st.dictionaries(
        st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.none(), max_size=2), max_size=3
    ),
    st.integers(60, 70).map(lambda n: eval("[" * n + "]" * n)),
)


def mutated(document: Any) -> st.SearchStrategy[Any]:
    """``document`` with one to three changes anywhere in it."""

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        out = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 3))):
            out = _changed(out, draw)
        return out

    return build()


def _changed(value: Any, draw: st.DrawFn) -> Any:
    """Down to a random place, and a change there."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JUNK)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    act = draw(st.sampled_from(["go", "go", "replace", "delete", "add"]))
    if act == "delete":
        del value[key]
    elif act == "add" and isinstance(value, dict):
        value[draw(st.text(max_size=8))] = draw(JUNK)
    elif act == "add":
        value.append(draw(JUNK))
    else:
        value[key] = draw(JUNK) if act == "replace" else _changed(value[key], draw)
    return value
