"""Targets in the metric of the Fisher information, and that metric's statistics, on pico models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mosectl.editing import second_moments as stats
from mosectl.editing.contexts import build_contexts, rows_of
from mosectl.editing.edited_layers import metric_of
from mosectl.editing.second_moments import second_moments
from mosectl.editing.targets import FURTHEST, RISE, TargetOptions, Targets, _Optimiser, optimise_targets
from mosectl.facts.corpus import read_corpus
from mosectl.facts.records import fact_from_dict
from mosectl.model.architecture import resolve
from mosectl.model.forward import SHORT, hooked, keys_at, open_outputs
from mosectl.model.losses import leads, token_nll
from mosectl.model.partial_forward import Suffix
from support.facts import CORPUS, FACTS
from support.models import make_tokenizer, pico


class Stage:
    """A pico model, two of its layers, two facts and a metric for each layer."""

    def __init__(self, n: int = 2, layers: int = 2) -> None:
        self.model, self.tokenizer = pico("llama"), make_tokenizer()
        self.arch = resolve(self.model)
        self.ps = list(self.arch.projections[:layers])
        facts = [fact_from_dict(f, "x") for f in FACTS[:n]]
        self.contexts = build_contexts(self.model, self.tokenizer, facts, [""])
        self.G = {}
        for i, p in enumerate(self.ps):  # far from round: variances from 1 to 100
            Q = torch.linalg.qr(torch.randn(p.d, p.d, generator=torch.Generator().manual_seed(i)))[0]
            self.G[p.name] = Q @ torch.diag(torch.logspace(0, 2, p.d)) @ Q.T

    def targets(self, metric: bool = True, **options: Any) -> Targets:
        inverse = {n: torch.linalg.inv(G) for n, G in self.G.items()} if metric else None
        usual = {"preserve_norm": 0, "kl_weight": 0.0, "decay": 0.0, "max_displacement": 1e6, "margin": 6.0}
        how = TargetOptions(**{**usual, **options})
        return optimise_targets(self.model, self.arch, self.ps, self.contexts, how, metric=inverse)

    def shifts(self, found: Targets) -> list[Tensor]:
        """(rows, d) by layer: how far each target lies from what the layer writes, lower layers being shifted."""
        c, rows = self.contexts, self.contexts.edit_rows
        out: list[Tensor] = []
        for p, v in zip(self.ps, found.V, strict=True):
            with hooked(self.adding(out)):
                (k,) = keys_at(self.model, [p], c.batch.rows(rows), c.token[rows])
            out.append(v - k @ self.model.get_submodule(p.name).weight.detach().T)
        return out

    def adding(self, shifts: list[Tensor]) -> list[Any]:
        """Hooks that add (rows, d) to what the lowest layers write at the subjects."""
        at = self.contexts.token[self.contexts.edit_rows]

        def hook(shift: Tensor, out: Tensor) -> Tensor:
            out = out.clone()
            out[torch.arange(len(shift)), at[: len(shift)]] += shift
            return out

        return [
            self.model.get_submodule(p.name).register_forward_hook(lambda _, __, out, s=s: hook(s, out))
            for p, s in zip(self.ps, shifts, strict=False)
        ]

    def loss(self, shifts: list[Tensor]) -> float:
        """Loss of the first fact, nats a token, with something added to what the layers write at its subject."""
        c, row = self.contexts, self.contexts.edit_rows[:1]
        with hooked(self.adding(shifts)), torch.no_grad():
            asked = c.targets[row] >= 0
            logits = Suffix(self.model, self.arch, 0, c.batch.rows(row)).logits(
                torch.tensor([0]), c.positions[row], asked
            )
        return float(token_nll(logits.double().log_softmax(-1), c.targets[row], asked))


def optimiser(stage: Stage, **options: Any) -> _Optimiser:
    """The search for the stage's targets, not begun."""
    how = TargetOptions(preserve_norm=0, kl_weight=0.0, max_displacement=1e6, **options)
    inverse = {n: torch.linalg.inv(G) for n, G in stage.G.items()}
    return _Optimiser(stage.model, stage.arch, stage.ps, stage.contexts, how, inverse)


def test_a_step_is_the_gradient_in_the_metric() -> None:
    """G δ points down the gradient, found by differences, in both layers at once; its length is for ``drop`` nats."""
    stage = Stage(n=1)
    drop = 0.1
    moved = stage.shifts(stage.targets(steps=1, margin=50.0, nats_per_step=drop))
    still = [torch.zeros_like(s) for s in moved]
    slopes = []
    for i, p in enumerate(stage.ps):
        g = torch.zeros(p.d)
        for j in range(p.d):
            e = [s.clone() for s in still]
            e[i][0, j] = 1e-2
            g[j] = (stage.loss(e) - stage.loss([-x for x in e])) / 2e-2
        down = -stage.G[p.name] @ moved[i][0]
        assert float(torch.cosine_similarity(g, down, dim=0)) > 0.99
        slopes.append(float(down.norm() / g.norm()))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.1), "one step length for all layers of a fact"
    assert stage.loss(still) - stage.loss(moved) == pytest.approx(drop, rel=0.2)


def test_targets_in_the_metric_cost_less_than_adams() -> None:
    stage = Stage()
    how = {"steps": 60, "margin": 1.5}
    found, adam = stage.targets(nats_per_step=0.5, **how), stage.targets(metric=False, step_size=0.1, **how)
    assert bool(found.converged.all()) and bool(adam.converged.all())

    def cost(t: Targets) -> float:
        return sum(float(((s @ stage.G[p.name]) * s).sum()) for p, s in zip(stage.ps, stage.shifts(t), strict=True))

    assert cost(found) < 0.3 * cost(adam)


def test_a_step_that_raises_the_loss_is_halved() -> None:
    stage = Stage(n=1)
    wild = stage.targets(nats_per_step=100.0, steps=60, margin=2.0)
    assert bool(wild.converged.all()) and float(wild.loss) < 3
    few = stage.targets(nats_per_step=100.0, steps=2, margin=2.0)
    assert not bool(few.converged.any())
    never, longer = (float(stage.targets(nats_per_step=100.0, steps=n, margin=50.0).loss) for n in (20, 60))
    assert longer < never < 1.8, "steps grow shorter where there is nothing to gain, the loss does not swing"


def test_a_gradient_that_rounds_to_almost_nothing_moves_nothing_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step alone would be the longer the smaller it is: η is the loss over the square of the gradient."""
    stage = Stage(n=1)
    usual = optimiser(stage, steps=1, margin=50.0, nats_per_step=0.5)
    usual.run(lambda _: None)
    first = float(usual.deltas[0].detach().norm())
    grad, asked = torch.autograd.grad, []

    def vanishing(*args: Any, **how: Any) -> Any:
        asked.append(1)
        return tuple(g * (1e-6 if len(asked) == 3 else 1) for g in grad(*args, **how))

    monkeypatch.setattr(torch.autograd, "grad", vanishing)
    lost = optimiser(stage, steps=3, margin=50.0, nats_per_step=0.5)
    lost.run(lambda _: None)
    assert len(asked) == 3 and float((lost.deltas[0] - lost.before[0]).detach().norm()) == pytest.approx(
        FURTHEST * first
    )


def test_a_loss_that_rises_by_rounding_alone_is_no_step_too_far() -> None:
    stage = Stage(n=1)
    for rise, pace in ((0.5 * RISE, 1.0), (2 * RISE, 0.5)):
        found = optimiser(stage, steps=1, margin=50.0)
        found.reached[:] = float(stage.targets(steps=0).loss) - rise
        found.run(lambda _: None)
        assert float(found.pace[0]) == pace


def test_rows_that_lead_do_not_pull() -> None:
    """Of a fact's two contexts only the one that does not lead by the margin yet gives the direction."""
    stage = Stage(n=1, layers=1)
    fact = [fact_from_dict(FACTS[0], "x")]
    both = build_contexts(stage.model, stage.tokenizer, fact, ["", "Born in a town. "])
    kl = (~both.is_edit).nonzero().flatten()
    alone = [rows_of(both, torch.cat([row[None], kl])) for row in both.edit_rows]
    leads = []
    for stage.contexts in alone:
        leads.append(float(stage.targets(steps=0).margin_before))
    late = leads.index(min(leads))
    how = {"steps": 1, "margin": sum(leads) / 2, "drop": 0.1}

    def shift(row: int) -> Tensor:
        stage.contexts = alone[row]
        (still,) = stage.targets(steps=0).V
        (moved,) = stage.targets(**{**how, "margin": 50.0}).V
        return (moved - still)[0]

    wanted, other = shift(late), shift(1 - late)
    stage.contexts = both
    (still,), (moved,) = stage.targets(steps=0).V, stage.targets(**how).V
    for found in moved - still:
        assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.9999
        assert float(torch.cosine_similarity(found, other, dim=0)) < 0.99


def test_a_fact_may_be_asked_for_less_than_the_margin() -> None:
    stage = Stage()
    usual = stage.targets()
    least = torch.tensor([6.0, 1.0])[stage.contexts.fact]
    stage.contexts = replace(stage.contexts, least=least)
    found = stage.targets()
    assert found.converged.tolist() == [usual.converged[0], True] and 1 <= found.margin[1] < usual.margin[1]
    assert found.steps[1] < usual.steps[1] and found.steps[0] == usual.steps[0]
    for now, then in zip(found.V, usual.V, strict=True):
        torch.testing.assert_close(now[0], then[0], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(now[1], then[1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_gradients_in_bfloat16_are_taken_through_plain_attention(kind: torch.dtype) -> None:
    """Where the fused one is slow: on a CPU in 16 bits, through short sequences."""
    stage = Stage()
    model = stage.model.to(kind)
    fused: list[tuple[bool, bool]] = []
    rows = torch.arange(len(stage.contexts.fact))

    def run(suffix: Suffix) -> None:
        c = stage.contexts
        with open_outputs(model, stage.ps[:1], lambda k: k):
            suffix.logits(rows, c.positions, c.targets >= 0)

    def note(*_: Any) -> None:
        fused.append((torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled()))

    suffix = Suffix(model, stage.arch, 0, stage.contexts.batch)
    with hooked([model.register_forward_pre_hook(note)]):
        run(suffix)
        with torch.no_grad():
            run(suffix)
        suffix.width = SHORT + 1
        run(suffix)
    assert fused == [(True, kind == torch.float32), (False, True), (True, True)]
    assert torch.backends.cuda.flash_sdp_enabled(), "as it was"


def test_reach_bounds_the_steps() -> None:
    stage = Stage()
    c, rows = stage.contexts, stage.contexts.edit_rows
    (k, _) = keys_at(stage.model, stage.ps, c.batch.rows(rows), c.token[rows])
    length = (k @ stage.model.get_submodule(stage.ps[0].name).weight.detach().T).norm(dim=1)
    shift, _ = stage.shifts(stage.targets(steps=5, margin=50.0, nats_per_step=5.0, max_displacement=0.25))
    assert torch.allclose(shift.norm(dim=1), 0.25 * length, rtol=1e-3)


def test_gradient_moments_against_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text, with the likeliest token for a label instead of a drawn one."""
    (tmp_path / "corpus.txt").write_text(CORPUS)
    monkeypatch.setattr("mosectl.editing.second_moments.ASKED", 1)
    monkeypatch.setattr("mosectl.editing.second_moments.PER_DIRECTION", 10**9)
    monkeypatch.setattr(
        "mosectl.editing.second_moments.torch.multinomial", lambda p, *_, **__: p.argmax(-1, keepdim=True)
    )
    model, tokenizer = pico("gpt2"), make_tokenizer()
    arch = resolve(model)
    found = second_moments(model, tokenizer, arch.projections[:2], read_corpus(tmp_path / "corpus.txt"), cache=False)
    p = arch.projections[1]
    total, n = torch.zeros(p.d, p.d), 0
    for text in CORPUS.splitlines():
        kept: list[Tensor] = []

        def keep(_: Any, __: Any, out: Tensor, kept: list[Tensor] = kept) -> None:
            out.retain_grad()
            kept.append(out)

        with hooked([model.get_submodule(p.name).register_forward_hook(keep)]):
            logp = model(**tokenizer(text, return_tensors="pt")).logits.log_softmax(-1)
        (-logp.max(-1).values.sum()).backward()
        g = kept[0].grad[0]
        total, n = total + g.T @ g, n + len(g)
    assert found.G[p.name].shape == (p.d, p.d)
    assert torch.allclose(found.G[p.name], total / n, rtol=1e-3, atol=1e-4 * float(total.diagonal().mean() / n))
    again = second_moments(model, tokenizer, arch.projections[:2], read_corpus(tmp_path / "corpus.txt"), cache=False)
    assert torch.equal(found.G[p.name], again.G[p.name])


def test_gradients_are_taken_over_a_share_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join([CORPUS] * 9))
    model, tokenizer = pico("llama"), make_tokenizer()
    asked: Any = (model, tokenizer, resolve(model).projections[:2], read_corpus(tmp_path / "corpus.txt"))
    calls: list[int] = []
    real = stats._keys_and_gradients
    monkeypatch.setattr(stats, "_keys_and_gradients", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(stats, "PER_DIRECTION", 10**6)
    whole = second_moments(*asked, batch_tokens=64, cache=False)
    batches = len(calls)
    monkeypatch.setattr(stats, "LEAST", 0)
    monkeypatch.setattr(stats, "PER_DIRECTION", whole.tokens / 2 / asked[2][0].d)
    part = second_moments(*asked, batch_tokens=64, cache=False)
    assert part.tokens == whole.tokens and 1 <= len(calls) - batches <= batches
    for name, C in whole.C.items():
        assert torch.allclose(part.C[name], C, rtol=1e-3, atol=1e-5)
        ratio = float(part.G[name].trace() / whole.G[name].trace())
        assert 0.5 < ratio < 2 and not torch.equal(part.G[name], whole.G[name])


def test_a_metric_without_gradients_is_finite() -> None:
    assert bool(torch.isfinite(metric_of(torch.zeros(4, 4, dtype=torch.float64))).all())
    G = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert torch.allclose(metric_of(G), torch.diag(1 / torch.tensor([1.2, 3.2])))


def test_nll_and_leads_of_answers_that_differ_in_length() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp = logits.log_softmax(-1)
    targets = torch.tensor([[3, 5], [2, -1], [-1, -1]])
    asked = torch.tensor(
        [[True, True], [True, False], [True, False]]
    )  # the last row's logits are asked, no token expected
    wanted = [-(logp[0, 3] + logp[1, 5]) / 2, -logp[2, 2], 0.0]
    assert token_nll(logp, targets, asked).tolist() == pytest.approx([float(x) for x in wanted])

    def lead(row: int, token: int) -> float:
        return float(logp[row, token] - max(x for i, x in enumerate(logp[row]) if i != token))

    found = leads(logp, targets, asked).tolist()
    assert found == pytest.approx([min(lead(0, 3), lead(1, 5)), lead(2, 2), float("inf")])


def test_the_divergence_is_from_what_the_unedited_model_said_of_the_subject() -> None:
    stage = Stage(layers=1)
    c, p = stage.contexts, stage.ps[0]
    made = _Optimiser(stage.model, stage.arch, [p], c, TargetOptions(preserve_norm=0, margin=6.0), None)
    every = torch.arange(len(c.fact))
    assert made._forward(every)[2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    for i, delta in enumerate(made.deltas):
        delta.data.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(i)))
    kl = made._forward(every)[2].detach()
    for i, delta in enumerate(made.deltas):
        (row,) = ((c.fact == i) & ~c.is_edit).nonzero().flatten().tolist()

        def hook(_: Any, __: Any, out: Tensor, row: int = row, delta: Tensor = delta) -> Tensor:
            out = out.clone()
            y = out[0, c.token[row]]
            out[0, c.token[row]] = y + y.norm() * delta.detach()[0]
            return out

        def said(row: int = row) -> Tensor:
            logits = stage.model(**c.batch.rows(torch.tensor([row])).kwargs()).logits[0, c.positions[row, 0]]
            return logits.double().log_softmax(-1)

        with torch.no_grad():
            before = said()
            with hooked([stage.model.get_submodule(p.name).register_forward_hook(hook)]):
                after = said()
        assert float(kl[i]) == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3)
        assert float(kl[i]) > 1e-3
