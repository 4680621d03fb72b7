"""A folder with everything that a report can show, made without a model; and an evaluation that has every part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mosectl.facts.records import fact_from_dict
from mosectl.facts.writer import lines
from mosectl.linalg.rotation import nearest_rotation
from mosectl.measure.before_after import Subject
from mosectl.measure.bootstrap import Measure
from mosectl.measure.evaluate import EvaluatedFact, Evaluation, TextMetric
from mosectl.measure.lm_harness import Ability, Score
from mosectl.measure.metrics import Metric
from mosectl.measure.next_tokens import NextToken
from mosectl.measure.probes import ProbeAnswer
from mosectl.measure.retention import Bin, Cohort, CohortPart
from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from mosectl.patch.record import PatchFact
from mosectl.text.jsonable import jsonable
from support.patches import MODULE, make

M = Measure(0.75, 0.5, 0.875, 12)
SHARES = [
    {"metric": "reliability", "group": "", "own": False, "asked": 36, "qa": 0.97, "strict": 0.95},
    {"metric": "generalization", "group": "", "own": False, "asked": 0, "qa": None, "strict": None},
    {"metric": "locality", "group": "same_subject", "own": True, "asked": 90, "qa": 0.56, "strict": 0.44},
]
STABILITY = {
    "name": f"{MODULE}.weight", "norm_before": 17.9, "norm_after": 17.9, "condition_before": 13.8, "condition_after": 13.8,
    "norm_drift": 1.6e-9, "condition_drift": 1.5e-8, "spectrum_drift": 2.1e-8,
}  # fmt: skip


def fact(i: int, new: str = "Port Vereville", more: str = "") -> PatchFact:
    """The last of five did not take, and was not there right after its batch either."""
    took = i % 5 != 4
    said = new if took else "Old Harbour"
    prompt = f"The birthplace of person number {i}{more} is"
    return PatchFact(
        prompt, f"person number {i}", new, "Old Harbour", said, 0.004 + i / 1000, 0.7 + i / 1000,
        "changed" if took else "not reached", right_after=said,
    )  # fmt: skip


def patch(seed: int, facts: tuple[PatchFact, ...], **changes: Any) -> Patch:
    g = torch.Generator().manual_seed(seed)
    R = nearest_rotation(torch.eye(8) + 0.3 * torch.randn(8, 8, generator=g)).float()
    metrics = {
        "shares": SHARES, "stability": [STABILITY], "scores": {},
        "next_tokens": [{"of": "text", "group": "", "own": False, "prompts": 24, "kl": 0.0025, "top1": 0.958}],
    }  # fmt: skip
    options = {"guard": 1.0, "batch_size": 10, "layers": [1]}
    content = {
        "changes": {MODULE: Change({"R": R})},
        "facts": facts,
        "metrics": metrics,
        "options": options,
        "seed": seed,
    }
    return make(**{**content, **changes})


def evaluation(word: str = "") -> Evaluation:
    """Every part of an evaluation; ``word`` stands in every text of it that a file or a model may bring."""
    facts = tuple(
        EvaluatedFact(
            f"The capital of land {i} is{word}", f"land {i}", f"New Town {word}".strip(), f"Old Town{word}",
            f"New Town{word}", f"New Town{word}", 0.01 * i, 1 - 0.01 * i, i != 3, True, {"generation.reliability": 1.0},
        )
        for i in range(12)
    )  # fmt: skip
    metrics = (
        Metric("generation", "reliability", Measure(0, 0, 0.2, 12), M, M, 12),
        Metric("generation", "locality", M, None, M, 24),
        Metric("generation", "locality", M, None, M, 24, word or "same_subject", True),
        Metric("generation", "portability", None, None, None, 0),
    )
    probe = ProbeAnswer(
        1, f"Land 1 is{word}", "locality", word or "same_subject", True, None, "a", f"b{word}", False, False, "changed"
    )
    part = CohortPart("locality", word or "neighborhood", False, 10, M)
    made = ("ab" * 32,), (fact(0),), ("cd" * 32,), False, True
    return Evaluation(
        subject=Subject("patch", f"patch.safetensors{word}", f"/home/me/base{word}", *made),
        metrics=metrics,
        texts=(TextMetric("perplexity", f"text.txt{word}", Measure(2.3, 2.2, 2.4, 50), Measure(2.4, 2.3, 2.5, 50)),),
        abilities=(Ability(f"rte{word}", "acc", True, Score(0.5, 0.1), Score(0.4, 0.1), M, 64),),
        retention=(Bin(1, 6, 1.0, 1.0), Bin(7, 12, 1.0, 0.5)),
        facts=facts,
        notes=(f"the text is held out{word}",),
        settings={"protocols": {"generation": f"greedy{word}"}, "text": "text.txt", "resamples": 1000, "seed": 0},
        seconds=1.5,
        next_tokens=(NextToken("text", "", False, 24, M, M),),
        probes=(probe, replace(probe, fact=2, change="")),
        cohorts=(Cohort("oldest", 1, 10, M, M, M, (part,)),),
    )  # fmt: skip


def result(word: str = "", **changes: Any) -> dict[str, Any]:
    """A bench's cell."""
    m = {"value": 0.5, "low": 0.4, "high": 0.6}
    sides = {"before": {"value": 2.5}, "after": {"value": 2.75}}
    cohort = {"name": "oldest", "first": 1, "last": 10, "after": m, "right_after": m, "kept": m, "parts": []}
    done = {
        "key": "k", "status": "done", "reason": "", "edits": 30, "batch_size": 15, "seed": 0, "label": f"memit{word}",
        "model": f"/home/me/models/pico{word}", "dataset": f"demo{word}", "harmonic": 0.5, "seconds": {"all": 12.5},
        "scores": dict.fromkeys(("reliability", "generalization", "locality"), m), "drift": {"norm": 0.5, "spectrum": None},
        "text_loss": sides, "perplexity": sides, "stopped": f"ordinary text became less likely{word}", "cohorts": [cohort],
    }  # fmt: skip
    return {**done, **changes}


def folder(path: Path, word: str = "") -> Path:
    """Two patches that contradict each other, an evaluation, a bench, and files that are left out.

    Args:
        word: stands in every text that a file or a model may bring.
    """
    path.mkdir(parents=True)
    many = tuple(replace(fact(i), target_new=f"Port Vereville{word}") for i in range(30))
    many = (
        *many,
        replace(fact(30), prompt=f"person number 30{word} was born in", right_after=f"x{word}", after=f"y{word}"),
    )
    first = patch(
        1, many, model=f"pico-instruct-chat{word}", method=f"mose{word}", versions={"mosectl": f"0.1.0{word}"}
    )
    first.save(path / "first.safetensors")
    other = fact(0, f"New Harbour{word}")
    patch(2, (replace(other, right_after=None),), parents=("ab" * 32,)).save(path / "second.safetensors")
    missed = replace(fact_from_dict({"prompt": "A is", "subject": "A", "target_new": "B"}, "x"), prompt=f"A is{word}")
    (path / "first.safetensors.missed.jsonl").write_bytes(lines([(missed, "not reached")]))
    (path / "eval.json").write_text(json.dumps(jsonable(evaluation(word)), indent=2))
    rows = (result(word), result(word, key="l", status="failed", reason=f"broke down{word}"))
    (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"key": 1}\n')
    (path / "short.safetensors").write_bytes((path / "first.safetensors").read_bytes()[:-8])
    save_file({"model.embed": torch.zeros(2, 2)}, path / "model.safetensors")
    (path / "other.json").write_text('{"a": 1}')
    (path / "config.json").write_text("{}")
    return path
