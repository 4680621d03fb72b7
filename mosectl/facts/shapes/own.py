"""mosectl's own shape, with the names that EasyEdit and others have for the same fields.

EasyEdit: https://github.com/zjunlp/EasyEdit, arguments of BaseEditor.edit; ROME's and MEMIT's requests (target_new{str}):
https://github.com/kmeng01/memit.
"""

from __future__ import annotations

from mosectl.facts.shapes.shape import Shape

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "subject": ("subject",),
    "target_new": ("target_new",),
    "ground_truth": ("ground_truth", "target_true", "target_old"),
    "rephrase_prompts": (
        "rephrase_prompts", "rephrase_prompt", "rephrase", "rephrases", "rephrasings",
        "paraphrase_prompts", "paraphrases", "ood_rephrase",
    ),
    "target_aliases": ("target_aliases",),
    "space_before_target": ("space_before_target",),
}  # fmt: skip
REQUIRED = ("prompt", "subject", "target_new")
# Where probes stand, and where their answers stand if not with them, in any shape.
PROBES = {
    "locality": {
        "locality": "", "locality_inputs": "", "locality_prompt": "locality_ground_truth",
        "neighborhood_prompts": "ground_truth", "loc": "loc_ans",  # CounterFact's neighbours share the true object
    },
    "portability": {
        "portability": "", "portability_inputs": "", "portability_prompt": "portability_ground_truth",
    },
}  # fmt: skip
OPTIONAL = {
    *(name for field, names in NAMES.items() if field not in REQUIRED for name in names),
    *(name for places in PROBES.values() for pair in places.items() for name in pair if name),
}
SEVERAL = OPTIONAL - {*NAMES["ground_truth"], *NAMES["space_before_target"]}  # what may hold several texts in a table
OTHERS = {  # what data sets carry besides
    *(
        "",
        "id",
        "idx",
        "index",
        "case_id",
        "known_id",
        "pararel_idx",
        "relation",
        "relation_id",
        "template",
        "prediction",
    ),
    *("attribute", "attribute_prompts", "generation_prompts", "cond", "Recalled Relation", "Unnamed: 0", "labels"),
    *("concept", "source", "split", "category", "type"),
    "missed",  # mosectl's own mark (facts/writer.py)
}
OWN = Shape("mosectl", "docs/reference/facts-files.md", (REQUIRED,), NAMES, OPTIONAL, OTHERS)
