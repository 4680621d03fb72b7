"""KnowEdit's WikiBio: `concept`, `text`, `labels`. Its other files have the names of mosectl's own shape, and groups.

easyeditor/dataset/knowedit.py of https://github.com/zjunlp/EasyEdit; https://huggingface.co/datasets/zjunlp/KnowEdit.
Each of the three may also be called as in the other files.
"""

from __future__ import annotations

from mosectl.facts.shapes.shape import Shape

KNOWEDIT = Shape(
    "KnowEdit",
    "https://huggingface.co/datasets/zjunlp/KnowEdit",
    (("concept",), ("concept", "prompt"), ("text", "labels")),
    {"prompt": ("prompt", "text"), "subject": ("subject", "concept"), "target_new": ("target_new", "labels")},
)
