"""CounterFact: a request, and the prompts that are asked about it.

https://rome.baulab.info/data/dsets/counterfact.json; dsets/counterfact.py of https://github.com/kmeng01/memit.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.messages import bad
from mosectl.facts.shapes.shape import Part, Row, Shape, an_object

REQUEST = "requested_rewrite"


def request(rewrite: Row, place: str) -> tuple[Row, dict[str, str]]:
    """The fields of a request, and where they stand."""
    return rewrite, {n: f"{place}.{n}" for n in (*rewrite, "prompt", "subject", "target_new")}


def _parts(row: Row, where: str) -> Iterator[Part]:
    if isinstance(row[REQUEST], list):
        fix = "MQuAKE's shape has 'questions' and 'new_answer' besides, CounterFact's has one object"
        raise bad(where, f"'{REQUEST}' is a list", fix)
    rewrite, called = request(an_object(row[REQUEST], REQUEST, "CounterFact", where), REQUEST)
    yield Part({**row, **rewrite}, called, objects=(("", row), (f"{REQUEST}.", rewrite)))


COUNTERFACT = Shape(
    "CounterFact", "https://rome.baulab.info/data/dsets/counterfact.json", ((REQUEST,),), parts=_parts
)  # fmt: skip
