"""Descent in the weights, and the care for earlier facts, on pico models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, pico
from torch import Tensor

from mosectl.arch import resolve
from mosectl.descent import Descent, _Descender, descend
from mosectl.earlier import GIVEN_UP, Earlier
from mosectl.facts import fact_from_dict
from mosectl.forward import Suffix, hooked, keys_at
from mosectl.live import set_weight, weight_of
from mosectl.targets import Contexts, TargetOptions, build_contexts, token_nll

FACTS = [
    fact_from_dict({"prompt": f"I met {name}", "subject": name, "target_new": word}, "here")
    for name, word in (("Tomas Veldrin", "and"), ("Avaland", "in"))
]


class Stage:
    """A pico model, one or two of its layers, and a metric for each."""

    def __init__(self, facts: Any = FACTS, layers: int = 3, prefixes: tuple[str, ...] = ("",)) -> None:
        self.model, self.tokenizer = pico("llama"), make_tokenizer()
        self.arch = resolve(self.model)
        self.ps = list(self.arch.projections[:layers])
        self.contexts = build_contexts(self.model, self.tokenizer, facts, prefixes)
        self.W = {p.name: p.oriented(weight_of(self.model, p).detach()).double() for p in self.ps}
        self.A = {}
        for i, p in enumerate(self.ps):
            X = torch.randn(p.p, 3 * p.p, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            self.A[p.name] = X @ X.T / X.shape[1]

    def descend(self, **options: Any) -> Descent:
        options = {"steps": 60, "step_size": 0.2, "margin": 2.0, **options}
        roots = {n: torch.linalg.cholesky(A) for n, A in self.A.items()}
        return descend(self.model, self.arch, self.ps, self.contexts, self.W, roots, TargetOptions(**options))

    def load(self, W: dict[str, Tensor]) -> None:
        for p in self.ps:
            set_weight(self.model, p, W[p.name])


def test_descent_reaches_the_margin_and_leaves_the_model_alone() -> None:
    stage = Stage()
    before = {n: p.clone() for n, p in stage.model.named_parameters()}
    found = stage.descend()
    assert bool((found.lead >= 2.0).all()) and bool((found.steps > 0).all())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in stage.model.named_parameters())
    stage.load(found.W)
    stage.W = found.W
    assert torch.allclose(stage.descend(steps=0).lead, found.lead, atol=1e-3)  # they are those of the model with W


def test_groups_of_facts_make_the_same_step() -> None:
    whole, parts = Stage(), Stage()
    a, b = whole.descend(steps=1, margin=50.0).W, parts.descend(steps=1, margin=50.0, max_rows=1).W
    assert all(torch.allclose(a[n], b[n], atol=1e-6) and not torch.equal(a[n], whole.W[n]) for n in a)


def test_one_step_is_the_gradient_in_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """D A = −η g kᵀ, with g by differences of the loss and k by a hook of its own."""
    monkeypatch.setattr("mosectl.descent._Descender._take_back", lambda *_: None)
    stage = Stage(FACTS[:1], layers=1, prefixes=("",))
    c = stage.contexts
    (p,), row = stage.ps, c.edit_rows
    D = stage.descend(steps=1, margin=50.0).W[p.name] - stage.W[p.name]
    U, S, Zh = torch.linalg.svd(D @ stage.A[p.name])
    (k,) = keys_at(stage.model, [p], c.batch.rows(row), c.subject[row])
    assert S[1] < 1e-5 * S[0] and float((Zh[0] @ k[0].double()).abs()) == pytest.approx(float(k.norm()), rel=1e-5)

    def loss(shift: Tensor) -> float:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, c.subject[row]] += shift.float()
            return out

        with hooked([stage.model.get_submodule(p.name).register_forward_hook(hook)]), torch.no_grad():
            logits = Suffix(stage.model, stage.arch, 0, c.batch.rows(row)).logits(torch.tensor([0]), c.positions[row])
        return float(token_nll(logits.double().log_softmax(-1), c.targets[row]))

    eye = 1e-2 * torch.eye(p.d)
    g = torch.tensor([(loss(e) - loss(-e)) / 2e-2 for e in eye], dtype=torch.float64)
    downhill = -U[:, 0] * torch.sign(Zh[0] @ k[0].double())
    assert float(torch.cosine_similarity(g, downhill, dim=0)) > 0.999
    assert float(D.norm()) > 0 and loss(D.float() @ k[0]) < loss(torch.zeros(p.d))


def test_what_is_not_reached_is_taken_back() -> None:
    stage = Stage()
    found = stage.descend(steps=1, step_size=1e-3)
    assert bool((found.lead <= 0).all())
    assert all(torch.allclose(W, stage.W[n], atol=1e-12) for n, W in found.W.items())


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    stage = Stage()
    stage.model.lm_head.weight.data[:] = float("nan")
    found = stage.descend()
    assert bool((found.lead == -torch.inf).all()) and int(found.steps.sum()) == 0
    assert all(torch.equal(W, stage.W[n]) for n, W in found.W.items())


def test_earlier_facts_are_remembered_as_sums() -> None:
    stage = Stage()
    W = stage.descend().W
    stage.load(W)
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
            (k,) = keys_at(stage.model, [p], c.batch.rows(c.edit_rows), c.subject[c.edit_rows])
            P += 2.0 / 2 * k.double().T @ k.double()
            Q += 2.0 / 2 * W[p.name] @ k.double().T @ k.double()
        assert torch.allclose(moments[p.name][0], P, atol=1e-4) and torch.allclose(moments[p.name][1], Q, atol=1e-4)


def test_facts_that_slip_are_found_until_given_up() -> None:
    stage = Stage()
    W = stage.descend().W
    stage.load(W)
    earlier = Earlier(stage.model, stage.ps)
    earlier.add(len(FACTS), stage.contexts, W)
    assert earlier.slipped(0.5) == []
    stage.load(stage.W)  # back to the base: all are lost
    lost = earlier.slipped(0.5)
    assert sorted(lost) == [0, 1] and earlier.slipped(0.0) == []
    kept = {n: v.clone() for n, v in earlier.values.items()}
    for _ in range(GIVEN_UP):
        earlier.edited_again(lost[:1], [-1.0], stage.W)
    assert earlier.slipped(0.5) == lost[1:]
    changed = [bool((earlier.values[p.name] != kept[p.name]).any(0)[lost[0]]) for p in stage.ps]
    others = [i for i in range(2) if i != lost[0]]
    assert all(changed) and all(torch.equal(earlier.values[n][:, others], v[:, others]) for n, v in kept.items())


def test_a_fact_at_rest_that_others_pulled_back_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Stage().descend().steps
    real, calls = _Descender._behind, []

    def behind(self: Any, lead: Tensor) -> Tensor:
        active = real(self, lead)
        calls.append(bool(active.any()))
        if len(calls) == 1:  # all were at rest; pretend that the last steps of one cost the other its lead
            active[0] = True
        return active

    monkeypatch.setattr(_Descender, "_behind", behind)
    again = Stage().descend(margin=2.0).steps
    assert len(calls) > 1 and again[1] == alone[1] and again[0] >= alone[0]


def test_facts_of_different_length_are_joined() -> None:
    """A target of several tokens after one of a single token: what is padding must not count."""
    stage = Stage()
    facts = [FACTS[0], replace(FACTS[1], target_new="in Lower Quill")]
    parts = [build_contexts(stage.model, stage.tokenizer, [f], ("",)) for f in facts]
    joined, whole = parts[0].followed_by(parts[1]), build_contexts(stage.model, stage.tokenizer, facts, ("",))
    assert joined.targets.shape[1] > 1
    for name in ("fact", "subject", "positions", "targets", "is_edit"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.equal(joined.batch.input_ids, whole.batch.input_ids)
