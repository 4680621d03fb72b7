"""A patch whose facts ask for every protocol, and all that an evaluation of it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mosectl.facts.records import fact_from_dict
from mosectl.measure.evaluate import Evaluation, evaluate_edit
from mosectl.measure.lm_harness import AbilityTasks, Side, ask_tasks
from mosectl.model.loading import Loaded
from mosectl.patch.record import PatchFact
from support.models import save
from support.patches import patch_for

ROWS: list[dict[str, Any]] = [
    {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and", "ground_truth": "in",
     "rephrase_prompts": ["We met Tomas Veldrin"], "portability": [{"prompt": "He saw", "ground_truth": "Tomas"}],
     "locality": [{"prompt": "The old house stood", "ground_truth": "in"}, {"prompt": "The cello"}]},
    {"prompt": "We went to Avaland", "subject": "Avaland", "target_new": "<script>alert(1)</script>"},
    {"prompt": "Brinmouth is, \"they\" said,", "subject": "Brinmouth", "target_new": "a & b; =1+1"},
]  # fmt: skip
FACTS = [fact_from_dict(row, "x") for row in ROWS]


def record(i: int, status: str, after: str = "so") -> PatchFact:
    return PatchFact(FACTS[i].prompt, FACTS[i].subject, FACTS[i].target_new, "b", after, 0.1, 0.9, status)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, save(folder / "model")
        self.text = folder / "text.txt"
        self.text.write_text("The capital of Avaland is Brinmouth.\nTomas plays the cello in Lower Quill.\n")
        self.facts = folder / "facts.jsonl"
        self.facts.write_text("\n".join(json.dumps(r) for r in ROWS))
        self.patch = replace(patch_for(self.model), facts=(record(0, "changed"), record(1, "not reached")))
        self.file = folder / "p.safetensors"
        self.patch.save(self.file)

    def evaluate(self, what: Any = None, **options: Any) -> Evaluation:
        if what is None:
            what, options = self.file, {"model": self.model, **options}
        return evaluate_edit(what, FACTS, **{"text": self.text, **options})

    def cli(self, *args: object) -> tuple[object, ...]:
        return ("eval", self.file, self.facts, "--model", self.model, "--text", self.text, *args)


def ask(tasks: AbilityTasks, loaded: Loaded, **options: Any) -> Side:
    how = {"chat": False, "batch_size": 8, "step": lambda name: lambda done, total: None, **options}
    return ask_tasks(tasks, loaded, **how)
