"""UltraEditBench: questions, with a subject or without.

`prompt`, `rephrase_prompt`, `ans`, `loc`, `loc_ans`: data/ultraeditbench.py of https://github.com/XiaojieGu/UltraEdit;
`subject` besides: examples/run_ultraedit_editing.py of https://github.com/zjunlp/EasyEdit;
https://huggingface.co/datasets/XiaojieGu/UltraEditBench.
"""

from __future__ import annotations

from mosectl.facts.shapes.shape import Shape

ULTRAEDITBENCH = Shape(
    "UltraEditBench",
    "https://github.com/XiaojieGu/UltraEdit (data/ultraeditbench.py)",
    (("prompt", "ans"),),
    {"target_new": ("ans",)},
    whole_prompt=True,
)
