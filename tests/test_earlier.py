"""The care for earlier facts, on a pico model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mosectl.editing import previous_edits
from mosectl.editing.contexts import Contexts, build_contexts, rows_of
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
        earlier.add(build_contexts(stage.model, stage.tokenizer, facts, ("", "Born. ")), [1.0] * len(facts), W)
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
    earlier.add(stage.contexts, [1.0, 1.0], W)
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


def many(stage: Stage, n: int) -> tuple[Earlier, Contexts]:
    """A run of ``n`` facts, of two contexts each, taken in two batches."""
    facts = [replace(FACTS[i % 2], prompt=f"{'We all ' * (i % 3)}met {i} and {FACTS[i % 2].subject}") for i in range(n)]
    c = build_contexts(stage.model, stage.tokenizer, facts, ("", "Born. "))
    edited, earlier = c.edit_rows, Earlier(stage.model, stage.ps)
    for chosen, first in ((c.fact[edited] < n // 2, 0), (c.fact[edited] >= n // 2, n // 2)):
        rows = edited[chosen]
        earlier.add(rows_of(c, rows, first), [float(i) for i in range(len(rows) // 2)], stage.W)
        earlier.moments(1.0)
    return earlier, rows_of(c, edited)


def directly(stage: Stage, c: Contexts, values: Tensor) -> tuple[Tensor, Tensor]:
    (k,) = keys_at(stage.model, stage.ps, c.batch, c.token)
    return k.double().T @ k.double() / 2, values @ k.double() / 2


def test_sums_follow_facts_that_are_edited_again_and_keys_that_move() -> None:
    stage = Stage()
    name = stage.ps[0].name
    earlier, c = many(stage, 6)
    old = earlier.values[name].clone()
    earlier.edited_again([1, 4], [1.0, float("nan")], stage.base)
    rows = torch.isin(c.fact, torch.tensor([1, 4]))
    assert torch.equal((earlier.values[name] != old).any(0), rows) and earlier.failures == [0, 0, 0, 0, 1, 0]
    assert earlier.leads[1] == 1.0 and earlier.leads[4] < -20
    P, Q = earlier.moments(3.0)[name]
    wanted = directly(stage, c, earlier.values[name])
    assert torch.allclose(P, 3 * wanted[0], atol=1e-5) and torch.allclose(Q, 3 * wanted[1], atol=1e-5)
    with torch.no_grad():  # as if a layer below had moved
        stage.model.get_input_embeddings().weight.mul_(1.1).add_(0.01)
    assert not torch.allclose(P / 3, directly(stage, c, earlier.values[name])[0], atol=1e-5)
    P, Q = earlier.moments(1.0)[name]
    wanted = directly(stage, c, earlier.values[name])
    assert torch.allclose(P, wanted[0], atol=1e-5) and torch.allclose(Q, wanted[1], atol=1e-5)


def test_columns_of_no_more_than_so_many_facts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    name = stage.ps[0].name
    everything, c = many(stage, 8)
    whole = everything.moments(1.0)[name]
    monkeypatch.setattr(previous_edits, "STORED", 3)
    earlier, _ = many(stage, 8)
    assert earlier.column.unique().tolist() == [0, 1, 4], "those that lead by least: 0, 1, 2, 3 nats and 0, 1, 2, 3"
    assert earlier.keys[name].shape[1] == earlier.values[name].shape[1] == len(earlier.column) == 6
    for mine, all_kept in zip(earlier.moments(1.0)[name], whole, strict=True):
        assert torch.allclose(mine, all_kept, atol=1e-6), "the others stay in the sums"
    P, _ = (x.clone() for x in earlier.moments(1.0)[name])
    earlier.edited_again([7, 1], [0.5, 0.5], stage.base)
    assert earlier.column.tolist() == [0, 0, 1, 1, 4, 4, 7, 7], "its columns are kept from now on"
    K = keys_at(stage.model, stage.ps, c.batch, c.token)[0].double()[c.fact == 7]
    assert torch.allclose(earlier.moments(1.0)[name][0], P + K.T @ K / 2, atol=1e-6), "and count beside what it was"
    monkeypatch.setattr(Earlier, "_leads", lambda self, rows: torch.full((len(rows),), 9.0))
    assert earlier.slipped(1.0) == [] and earlier.kept().column is earlier.column


def test_what_a_batch_asks_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in (("LEAST", 2), ("IN_TURN", 2), ("RENEWED", 3)):
        monkeypatch.setattr(previous_edits, limit, most)
    stage = Stage()
    earlier, _ = many(stage, 12)
    led, asked, renewed = Earlier._leads, [], []
    monkeypatch.setattr(Earlier, "_leads", lambda self, rows: asked.append(rows.tolist()) or led(self, rows))
    own = Earlier._renew
    monkeypatch.setattr(Earlier, "_renew", lambda self, facts, *W: renewed.append(facts) or own(self, facts, *W))
    earlier.leads = [50.0] * 10 + [-5.0, -5.0]
    for batch in range(5):
        earlier.turn = batch
        earlier.slipped(0.1)
        earlier.moments(1.0)
    assert {len(rows) for rows in asked} == {4} and {len(facts) for facts in renewed} == {3}
    assert {r // 2 for rows in asked for r in rows} == set(range(12)) == {i for facts in renewed for i in facts}


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
