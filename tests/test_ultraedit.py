"""UltraEdit against its formulas in float64; docs/LOG.md says how it compares with its own code."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from mosectl.editing.methods import method
from mosectl.model.architecture import resolve
from mosectl.model.weights import set_weight
from support.facts import FACTS
from support.models import pico
from support.training import ALL, answers, problem, token_losses


class Lifelong:
    """nets.py's RunningMeanStd as it is written there, in float64; a lone row's variance is 0."""

    def __init__(self) -> None:
        self.n, self.mean, self.var = 0, 0.0, 0.0

    def update(self, x: Tensor) -> None:
        m, delta = len(x), x.mean(0) - self.mean
        n = self.n + m
        self.mean = self.mean + m * delta / n
        self.var = self.var + m * (x.var(0) if m > 1 else 0.0) + self.n * m * delta**2 / n
        self.n = n

    def __call__(self, x: Tensor) -> Tensor:
        eps = torch.finfo(torch.float32).eps
        return (x - self.mean) / ((self.var / (self.n - 1 + eps)) ** 0.5 + eps)


def features(model: Any, names: list[str], facts: list[Any]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(k, g) at each token that predicts one of a target's, by layer, of the mean loss over all of these tokens."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    rows = answers(facts, end=False)
    total = sum(len(ids) - prompt for ids, prompt in rows)
    for ids, prompt in rows:
        read: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(module: Any, args: Any, out: Tensor, name: str, read: Any = read) -> None:
            out.requires_grad_()
            out.retain_grad()
            read[name] = args[0], out

        handles = [
            model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n, hook=hook: hook(m, a, o, n))
            for n in names
        ]
        (token_losses(model, ids, prompt).sum() / total).backward()
        for handle in handles:
            handle.remove()
        for name, (k, out) in read.items():
            at = range(prompt - 1, len(ids) - 1)
            seen[name] += [(k.detach().flatten(0, -2)[t], out.grad.flatten(0, -2)[t]) for t in at]
    return seen


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ultraedit_is_one_ridge_solve_on_normalised_features(kind: str) -> None:
    """Two batches and two layers, which share one mean and deviation; groups of two facts, longest first."""
    model, layers, rate, lam = pico(kind).double(), (1, 2), 1e-3, 2.0
    names = [p.name for p in resolve(model).projections if p.layer in layers]
    naive, lifelong, carried = deepcopy(model).requires_grad_(False), Lifelong(), {}
    for facts in (ALL[:3], ALL[3:]):
        asked = problem("ultraedit", model, layers, facts, minibatch=2, rate=rate, ridge=lam, carried=carried)
        found = method("ultraedit").fit(asked)
        length = {id(f): len(ids) for f, (ids, _) in zip(facts, answers(facts, False), strict=True)}
        ordered = sorted(facts, key=lambda f: -length[id(f)])
        groups = [features(naive, names, ordered[i : i + 2]) for i in range(0, len(ordered), 2)]
        for group in groups:
            for name in names:
                lifelong.update(torch.stack([torch.cat(pair) for pair in group[name]]))
        for p in asked.projections:
            pairs = [pair for group in groups for pair in group[p.name]]
            K = torch.stack([k for k, _ in pairs])
            z = lifelong(torch.stack([torch.cat(pair) for pair in pairs]))
            V = torch.stack([-rate * (row[: p.p] @ row[: p.p]) * row[p.p :] for row in z])
            shift = (torch.linalg.inv(K.T @ K + lam * torch.eye(p.p)) @ K.T @ V).T
            assert float((found[p.name] - asked.W[p.name] - shift).norm() / shift.norm()) < 1e-4
            set_weight(model, p, found[p.name])
            set_weight(naive, p, asked.W[p.name] + shift)
    assert {n: tuple(x.shape) for n, x in carried.items()} == method("ultraedit").carries({n: (32, 48) for n in names})
    assert float(carried["count.32x48"]) == lifelong.n


def test_ultraedit_of_a_lone_token_changes_nothing_and_a_second_one_does() -> None:
    model, carried = pico("llama"), {}
    for turn, fact in enumerate(FACTS):
        asked = problem("ultraedit", model, (1,), [fact], carried=carried, rate=1e-3)
        (W,) = method("ultraedit").fit(asked).values()
        assert torch.isfinite(W).all()
        assert torch.equal(W, asked.W[asked.projections[0].name]) == (turn == 0)


def test_ultraedit_takes_facts_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 100):
        monkeypatch.setattr("mosectl.editing.methods.ultraedit.fitting", lambda *_, size=size: size)
        found.append(
            method("ultraedit").fit(problem("ultraedit", pico("llama").double(), (1,), ALL, rate=1e-2, minibatch=3))
        )
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-5) for n in found[0])
