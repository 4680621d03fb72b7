"""MEND's own files of zsRE and FEVER: KILT's questions and claims without a subject, with a model's prediction.

`input`, `prediction`, `alternatives`, `filtered_rephrases`, `output` (a list of `answer`): data_classes/zsre.py and fever.py
of https://github.com/eric-mitchell/mend. The first of `alternatives` is edited in, as there for FEVER (for zsRE: any of
them). The answers are the old objects, but for one that is edited in: FEVER's other verdict may be the right one.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.messages import empty
from mosectl.facts.shapes.shape import Part, Row, Shape, objects

NAME = "MEND"


def _parts(row: Row, where: str) -> Iterator[Part]:
    other = row["alternatives"]
    target = other[0] if isinstance(other, list) and other else other
    answers = [a.get("answer") for _, a in objects(row.get("output"), "output", NAME, where)]
    given = {"target_new": target, "ground_truth": [a for a in answers if not empty(a) and a != target]}
    called = {"target_new": "alternatives", "ground_truth": "output"}
    yield Part({**row, **given}, called, (), (("", row),))


MEND = Shape(
    NAME,
    "https://github.com/eric-mitchell/mend",
    (("input", "alternatives"),),
    {"prompt": ("input",), "rephrase_prompts": ("filtered_rephrases",)},
    ("output", "alternatives"),
    ("prediction", "logit", "meta"),
    parts=_parts,
    whole_prompt=True,
)
