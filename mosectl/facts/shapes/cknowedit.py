"""CKnowEdit: Chinese questions without a subject, with the wrong answer and the right one.

`prompt`, `target_old`, `target_new`, `portability` and `locality` (lists of `prompt`, `answer`; flat: `portability_prompt`,
`portability_answer`, …), `rephrase`: examples/CKnowEdit.md and easyeditor/dataset/Cknowedit.py of
https://github.com/zjunlp/EasyEdit, where the whole prompt, without some openings, is the subject.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.shapes.shape import Part, Row, Shape

_ANSWERS = {f"{metric}_answer": f"{metric}_ground_truth" for metric in ("locality", "portability")}


def _parts(row: Row, where: str) -> Iterator[Part]:
    yield Part(
        {_ANSWERS.get(n, n): v for n, v in row.items()}, {ours: n for n, ours in _ANSWERS.items()}, (), (("", row),)
    )


CKNOWEDIT = Shape(
    "CKnowEdit",
    "https://github.com/zjunlp/EasyEdit (examples/CKnowEdit.md)",
    (("prompt", "target_old", "target_new"),),
    reads=tuple(_ANSWERS),
    parts=_parts,
    whole_prompt=True,
)
