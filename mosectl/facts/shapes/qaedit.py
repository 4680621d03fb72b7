"""QAEdit: questions of QA data sets with the right answer as the new object.

`prompt`, `target`, `subject`, `rephrase`, `locality` (a list of `loc`, `loc_ans`), `source`, `id`: data/ and edit.py of
https://github.com/WanliYoung/Revisit-Editing-Evaluation; https://huggingface.co/datasets/WenDingY/QAEdit.
"""

from __future__ import annotations

from mosectl.facts.shapes.shape import Shape

QAEDIT = Shape(
    "QAEdit",
    "https://github.com/WanliYoung/Revisit-Editing-Evaluation",
    (("prompt", "target", "rephrase", "locality"),),
    {"target_new": ("target",)},
)
