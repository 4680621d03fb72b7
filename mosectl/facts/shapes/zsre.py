"""zsRE as MEND, MEMIT and EasyEdit have it, and as UltraEdit does.

Fields: `src`, `subject`, `alt`, `answers`, `pred`, `rephrase`, `loc`, `loc_ans` (dsets/zsre.py of
https://github.com/kmeng01/memit, easyeditor/dataset/zsre.py of https://github.com/zjunlp/EasyEdit); `src`, `ans`,
`rephrase`, `loc`, `loc_ans` (data/zsre.py of https://github.com/XiaojieGu/UltraEdit).

`answers` are right, `alt` is another object. EasyEdit and MEND edit `alt` in, as is done here, and hold `answers` for the
old object; MEMIT edits the first of `answers` in: --read target_new=answers (the others are then aliases).
"""

from __future__ import annotations

from mosectl.facts.shapes.shape import Shape

ZSRE = Shape(
    "zsRE",
    "https://github.com/kmeng01/memit (dsets/zsre.py)",
    (("src",),),
    {"prompt": ("src",), "target_new": ("alt", "ans"), "ground_truth": ("answers", "pred")},
    guesses=("pred",),  # what MEND's model said, which need not be an answer
    whole_prompt=True,  # as UltraEdit has it
)
