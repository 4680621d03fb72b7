"""WikiBigEdit: questions about changes in Wikidata, with a rephrasing, personas, a multi-hop question and one of another.

`subject`, `update`, `ans`, `rephrase`, `personas` (and `personas_…`), `mhop`, `mhop_ans`, `loc`, `loc_ans`, `tag` (there
is NaN among them, which counts as null): WikiBigEdit_Pipeline/combine_qa.py of
https://github.com/ExplainableML/WikiBigEdit, easyeditor/dataset/wikibigedit.py of https://github.com/zjunlp/EasyEdit.
Portability as there: the question in other voices (`personas`), and the multi-hop one.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.groups import MULTI_HOP
from mosectl.facts.shapes.shape import Asked, Part, Row, Shape

PERSONAS = "personas"


def _parts(row: Row, where: str) -> Iterator[Part]:
    voices = [str(n) for n in row if str(n) == PERSONAS or str(n).startswith(f"{PERSONAS}_")]
    asked = [Asked("portability", name, row[name], row.get("ans"), PERSONAS) for name in voices]
    asked.append(Asked("portability", "mhop", row.get("mhop"), row.get("mhop_ans"), MULTI_HOP))
    yield Part(row, {}, tuple(asked), (("", {n: v for n, v in row.items() if n not in voices}),))


WIKIBIGEDIT = Shape(
    "WikiBigEdit",
    "https://github.com/ExplainableML/WikiBigEdit",
    (("update", "ans"),),
    {"prompt": ("update",), "target_new": ("ans",)},
    (PERSONAS, "mhop", "mhop_ans"),
    ("tag", "subject_id", "object", "object_id"),
    parts=_parts,
)
