"""Facts of one subject share a value, in a batch and from batch to batch, on a pico model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mosectl
from mosectl.editing.by_subject import ALONG, companions, sharing
from mosectl.editing.contexts import Contexts, build_contexts
from mosectl.editing.previous_edits import Earlier
from mosectl.editing.session import Session
from mosectl.editing.targets import TargetOptions, Targets, optimise_targets
from mosectl.facts.records import Fact, fact_from_dict
from mosectl.model.architecture import resolve
from mosectl.model.forward import keys_at
from mosectl.model.weights import weight_of
from support.facts import CORPUS, few
from support.models import make_tokenizer, pico

# The subject ends the prompt: so a model of random weights can be made to say the targets.
PROMPTS = [
    ("I met Avaland", "Avaland", "in"),
    ("I met Tomas Veldrin", "Tomas Veldrin", "and"),
    ("We saw avaland", "avaland", "in"),
]


def fact(prompt: str, subject: str, target: str) -> Fact:
    return fact_from_dict({"prompt": prompt, "subject": subject, "target_new": target}, "here")


class Stage:
    """A pico model, its lowest layer and the facts' contexts."""

    def __init__(self, *prompts: tuple[str, str, str]) -> None:
        self.model, self.tokenizer = pico("llama"), make_tokenizer()
        self.arch = resolve(self.model)
        self.facts = [fact(*p) for p in prompts]
        self.contexts = build_contexts(self.model, self.tokenizer, self.facts, [""])

    def search(self, contexts: Contexts, needed: bool = True) -> Targets:
        free = {"preserve_norm": 0, "kl_weight": 0.0, "decay": 0.0, "max_displacement": 1e6, "step_size": 0.3}
        options = TargetOptions(steps=80 if needed else 0, margin=1.5, optimizer="adam", **free)
        return optimise_targets(self.model, self.arch, self.arch.projections[:1], contexts, options)

    def deltas(self, found: Targets) -> list[Tensor]:
        """δ (rows, d) of each fact: by how much of its length what the layer writes shall move."""
        p, c, rows = self.arch.projections[0], self.contexts, self.contexts.edit_rows
        (k,) = keys_at(self.model, [p], c.batch.rows(rows), c.token[rows])
        written = k @ weight_of(self.model, p).detach().T
        moved = (found.V[0] - written) / written.norm(dim=-1, keepdim=True)
        return [moved[c.fact[rows] == i] for i in range(len(self.facts))]


def test_facts_of_one_subject_share_a_value() -> None:
    stage = Stage(*PROMPTS[:2], ("We saw Avaland", "Avaland", "in"))
    subjects = [f.subject for f in stage.facts]
    apart, found = stage.search(stage.contexts), sharing(subjects, stage.contexts, stage.search)
    alone, shared = stage.deltas(apart), stage.deltas(found)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)
    torch.testing.assert_close(shared[0], shared[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared[1], alone[1], atol=1e-4, rtol=1e-4)
    assert bool(found.converged.all()) and bool((found.margin >= 1.5).all())  # both prompts are answered, by the margin
    assert found.steps[0] == found.steps[2]
    torch.testing.assert_close(found.margin_before, apart.margin_before)  # each fact's own
    torch.testing.assert_close(found.loss_before, apart.loss_before)
    assert found.margin_before[0] != found.margin_before[2]


def test_facts_of_different_subjects_are_searched_for_as_they_are() -> None:
    stage, asked = Stage(*PROMPTS[:2]), []

    def search(contexts: Contexts, needed: bool) -> Any:
        asked.append((contexts, needed))
        return "targets"

    assert sharing(["Avaland", "Tomas Veldrin"], stage.contexts, search) == "targets"
    assert asked == [(stage.contexts, True)]


def test_earlier_facts_of_a_batchs_subjects() -> None:
    facts = [fact(*PROMPTS[i]) for i in (0, 1, 2, 1, 0)]
    assert companions(facts, range(2), range(0)) == []
    assert companions(facts, range(2, 3), range(2)) == [0]  # "avaland" is Avaland
    assert companions(facts, range(3, 5), range(3)) == [0, 1, 2]
    assert companions(facts, [1], range(5)) == [3]
    assert companions([fact(*PROMPTS[0])] * (ALONG + 5), [ALONG + 4], range(ALONG + 4)) == [*range(4, ALONG + 4)]


@pytest.mark.parametrize(
    ("how", "expected"), [({}, [1, 1, 2]), ({"fact_token": "last"}, [1, 1, 1]), ({"replay_margin": 0.0}, [1, 1, 1])]
)
def test_they_are_edited_along(
    how: dict[str, Any], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    batch = Session._batch

    def seen(self: Session, contexts: Contexts, *args: Any) -> Targets:
        sizes.append(int(contexts.fact.max()) + 1)
        return batch(self, contexts, *args)

    monkeypatch.setattr(Session, "_batch", seen)
    for name in ("slipped", "slipped_of_all"):
        monkeypatch.setattr(Earlier, name, lambda self, below: [])
    (tmp_path / "corpus.txt").write_text(CORPUS)
    options = few(str(tmp_path / "corpus.txt"), batch_size=1, rounds=1, **how)
    mosectl.edit([fact(*p) for p in PROMPTS], pico("llama"), make_tokenizer(), options=options, refuse=False)
    assert sizes == expected
