"""Facts that models of random weights can be made to say, and settings that do it quickly."""

from __future__ import annotations

from mosectl.editing.options import EditOptions
from mosectl.editing.targets import TargetOptions

FACT = {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and"}
# The subject ends the prompt and the target is one token: what a model with random weights can be made to say.
FACTS = [
    {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and",
     "rephrase_prompts": ["We met Tomas Veldrin"], "locality": [{"prompt": "The old house stood"}]},
    {"prompt": "We went to Avaland", "subject": "Avaland", "target_new": "in"},
]  # fmt: skip
CORPUS = "The capital of Brinmouth is in Lower Quill.\nTomas was born.\nA cello plays in the capital."
FEW = EditOptions(
    layers="0,1,2",
    prefixes=0,
    solver={"preserve": 1e-4},
    targets=TargetOptions(optimizer="adam", step_size=0.3, margin=3.0, decay=0.0, kl_weight=0.0),
)


def few(corpus: str, **changes: object) -> EditOptions:
    return EditOptions(**{**vars(FEW), "corpus": corpus, **changes})  # type: ignore[arg-type]
