"""Facts, a model and a short training for the tests of trained editors."""

from __future__ import annotations

import json
from typing import Any

from mosectl.facts.corpus import Corpus
from mosectl.facts.records import Fact, Probe
from mosectl.hypernetwork.beforehand import TrainOptions
from mosectl.model.forward import input_device
from mosectl.model.loading import Loaded
from mosectl.model.scoring import Rows, encode_pair
from support.facts import CORPUS
from support.models import make_tokenizer, pico

TEXT = Corpus(
    "x", tuple(f"{CORPUS} number {i} of the towns lies near the sea and was born in the capital" for i in range(4))
)
FEW = TrainOptions(rank=8, batch_size=3, steps=6, every=2, rate=1e-2)


def facts(n: int = 9) -> list[Fact]:
    names = ["Brinmouth", "Lower Quill", "Tomas", "cello", "capital"]
    return [
        Fact(
            f"The capital of {names[i % 5]} {i} is", f"{names[i % 5]} {i}", names[(i + 1) % 5],
            rephrase_prompts=(f"{names[i % 5]} {i} was born in",), locality=(Probe("A cello plays in the", "capital"),),
        )
        for i in range(n)
    ]  # fmt: skip


def loaded(kind: str = "llama", **how: Any) -> Loaded:
    return Loaded(pico(kind, **how), make_tokenizer(), None)


def rows(n: int) -> str:
    return "\n".join(
        json.dumps(
            {
                "prompt": f.prompt, "subject": f.subject, "target_new": f.target_new,
                "rephrase_prompts": list(f.rephrase_prompts),
                "locality": [{"prompt": p.prompt, "ground_truth": p.answer} for p in f.locality],
            }
        )
        for f in facts(n)
    )  # fmt: skip


def asked(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> Rows:
    """Prompts with their answers as teacher-forced rows."""
    return Rows.of([encode_pair(tokenizer, pair) for pair in pairs], input_device(model))
