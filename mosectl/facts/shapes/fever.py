"""FEVER as UltraEdit has it: claims without a subject, with a verdict.

`prompt`, `equiv_prompt`, `alt`, `unrel_prompt`, `unrel_ans`: data/fever.py of https://github.com/XiaojieGu/UltraEdit. `alt`
is edited in, as there: the verdict that a model did not give. `ans` is the right one, which `alt` may be, too, so it is not
taken for the old object.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.shapes.shape import Asked, Part, Row, Shape


def _parts(row: Row, where: str) -> Iterator[Part]:
    asked = Asked("locality", "unrel_prompt", row.get("unrel_prompt"), row.get("unrel_ans"))
    yield Part(row, {}, (asked,), (("", row),))


FEVER = Shape(
    "FEVER",
    "https://github.com/XiaojieGu/UltraEdit (data/fever.py)",
    (("prompt", "alt", "equiv_prompt"), ("prompt", "alt", "unrel_prompt")),
    {"target_new": ("alt",), "rephrase_prompts": ("equiv_prompt",)},
    ("unrel_prompt", "unrel_ans"),
    ("ans",),
    parts=_parts,
    whole_prompt=True,
)
