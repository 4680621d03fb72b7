"""The care for earlier facts, on a pico model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mosectl.editing.contexts import Contexts, build_contexts
from mosectl.editing.previous_edits import GIVEN_UP, Earlier
from mosectl.editing.targets import TargetOptions, optimise_targets
from mosectl.facts.records import fact_from_dict
from mosectl.model.architecture import resolve
from mosectl.model.forward import keys_at
from mosectl.model.weights import set_weight, weight_of
from support.models import make_tokenizer, pico

FACTS = [
    fact_from_dict({"prompt": f"I met {name}", "subject": name, "target_new": word}, "here")
    for name, word in (("Tomas Veldrin", "and"), ("Avaland", "in"))
]


class Stage:
    """A pico model, its lowest layer, and the weight that makes it say the facts."""

    def __init__(self) -> None:
        self.model, self.tokenizer = pico("llama"), make_tokenizer()
        arch = resolve(self.model)
        self.ps = list(arch.projections[:1])
        c = self.contexts = build_contexts(self.model, self.tokenizer, FACTS, ("",))
        self.base = {p.name: p.oriented(weight_of(self.model, p).detach()).double() for p in self.ps}
        options = TargetOptions(steps=60, margin=2.0, preserve_norm=0, step_size=0.1)
        V = optimise_targets(self.model, arch, self.ps, c, options).V[0].double().T
        (k,) = keys_at(self.model, self.ps, c.batch.rows(c.edit_rows), c.token[c.edit_rows])
        W, K = self.base[self.ps[0].name], k.double().T
        self.W = {self.ps[0].name: W + (V - W @ K) @ torch.linalg.pinv(K)}
        self.load(self.W)

    def load(self, W: dict[str, Tensor]) -> None:
        for p in self.ps:
            set_weight(self.model, p, W[p.name])


def test_earlier_facts_are_remembered_as_sums() -> None:
    stage = Stage()
    W = stage.W
    earlier = Earlier(stage.model, stage.ps)
    assert earlier.moments(2.0) == {} and earlier.slipped(1.0) == []
    long = [replace(FACTS[1], prompt="We all went out and then I met Avaland")]
    for facts in (FACTS, long):  # rows of different length are joined
        earlier.add(len(facts), build_contexts(stage.model, stage.tokenizer, facts, ("", "Born. ")), W)
    moments = earlier.moments(2.0)
    for p in stage.ps:
        P, Q = torch.zeros_like(moments[p.name][0]), torch.zeros_like(moments[p.name][1])
        for fact in (*FACTS, *long):
            c: Contexts = build_contexts(stage.model, stage.tokenizer, [fact], ("", "Born. "))
            (k,) = keys_at(stage.model, [p], c.batch.rows(c.edit_rows), c.token[c.edit_rows])
            P += 2.0 / 2 * k.double().T @ k.double()
            Q += 2.0 / 2 * W[p.name] @ k.double().T @ k.double()
        assert torch.allclose(moments[p.name][0], P, atol=1e-4) and torch.allclose(moments[p.name][1], Q, atol=1e-4)


def test_facts_that_slip_are_found_until_given_up() -> None:
    stage = Stage()
    W = stage.W
    earlier = Earlier(stage.model, stage.ps)
    earlier.add(len(FACTS), stage.contexts, W)
    assert earlier.slipped(0.5) == []
    stage.load(stage.base)  # all are lost
    lost = earlier.slipped(0.5)
    assert sorted(lost) == [0, 1] and earlier.slipped(0.0) == []
    kept = {n: v.clone() for n, v in earlier.values.items()}
    for _ in range(GIVEN_UP):
        earlier.edited_again(lost[:1], [-1.0], stage.base)
    assert earlier.slipped(0.5) == lost[1:]
    changed = [bool((earlier.values[p.name] != kept[p.name]).any(0)[lost[0]]) for p in stage.ps]
    others = [i for i in range(2) if i != lost[0]]
    assert all(changed) and all(torch.equal(earlier.values[n][:, others], v[:, others]) for n, v in kept.items())


def test_facts_of_different_length_are_joined() -> None:
    """A target of several tokens after one of a single token: what is padding must not count."""
    stage = Stage()
    facts = [FACTS[0], replace(FACTS[1], target_new="in Lower Quill")]
    parts = [build_contexts(stage.model, stage.tokenizer, [f], ("",)) for f in facts]
    joined, whole = parts[0].followed_by(parts[1]), build_contexts(stage.model, stage.tokenizer, facts, ("",))
    assert joined.targets.shape[1] > 1
    for name in ("fact", "token", "positions", "targets", "is_edit"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.equal(joined.batch.input_ids, whole.batch.input_ids)
