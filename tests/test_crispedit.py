"""CrispEdit against naive fine-tuning on densely projected gradients; docs/LOG.md says how it compares with its own code."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mosectl.editing.contexts import Contexts, build_contexts, rows_of
from mosectl.editing.methods import crispedit, method
from mosectl.editing.methods.crispedit import LowCurvature, curvatures
from mosectl.editing.second_moments import Moments
from mosectl.facts.records import as_facts
from mosectl.model.architecture import resolve
from support.facts import FACTS
from support.models import pico
from support.problems import random
from support.training import ALL, TOKENIZER, Trained, agree, answers, problem

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


def spd(n: int, seed: int) -> Tensor:
    """A second moment whose eigenvalues fall off."""
    X = random(n, 3 * n, seed=seed) * torch.logspace(0, -2, n, dtype=torch.float64)[:, None]
    Q = torch.linalg.qr(random(n, n, seed=seed + 1))[0]
    return Q @ (X @ X.T) @ Q.T / (3 * n)


def dense_projector(G: Tensor, C: Tensor, energy: float) -> Tensor:
    """Onto the eigenvectors of G ⊗ C below the one with which the largest reach the share ``energy``; (d·p, d·p)."""
    values, vectors = torch.linalg.eigh(torch.kron(G, C))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = 1 + next(i for i in range(len(values)) if values[: i + 1].sum() >= energy * values.sum() * (1 - 1e-12))
    return vectors[:, rank:] @ vectors[:, rank:].T


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.999])
def test_low_curvature_is_the_dense_projector(energy: float) -> None:
    G, C, X = spd(5, 1), spd(7, 2), random(5, 7, seed=3)
    found = LowCurvature.of(G, C, energy)(X.float())
    expected = (dense_projector(G, C, energy) @ X.flatten()).view(5, 7)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert 0 < found.norm() < X.norm()


def test_no_curvature_leaves_all_and_all_of_it_leaves_nothing() -> None:
    X = random(5, 7).float()
    assert float(LowCurvature.of(spd(5, 1), spd(7, 2), 2.0)(X).norm()) == 0.0
    one = LowCurvature.of(torch.diag(torch.tensor([4.0, 1.0]).double()), torch.eye(3).double(), 0.1)
    assert one.free.tolist() == [[True] * 3, [False] * 3], "eigenvalues that equal the last one go with it"


def test_crispedit_is_adam_on_projected_gradients_and_goes_on_from_batch_to_batch() -> None:
    """Two batches with other curvature in the second, as earlier facts make it."""
    model, layers, carried = pico("llama", **SMALL).double(), (1, 2), {}
    names = [p.name for p in resolve(model).projections if p.layer in layers]
    expected, first = Trained(model, names, 1e-3), {}
    for turn, facts in enumerate((ALL[:3], ALL[3:])):
        G, C = ({n: spd(size, 10 * turn + i) for i, n in enumerate(names)} for size in (16, 24))
        asked = problem(
            "crispedit", model, layers, facts, minibatch=2, epochs=3, rate=1e-3, energy=0.8,
            moments=Moments(C, G, 100, False, 0.0), carried=carried,
        )  # fmt: skip
        dense = {n: dense_projector(G[n], C[n], 0.8) for n in names}

        def allowed(name: str, g: Tensor, dense: Any = dense) -> Tensor:
            return (dense[name] @ g.flatten()).view_as(g)

        for name, w in expected.weights.items():
            if turn:
                moment = expected.adam.state[w]["exp_avg"]
                moment.copy_(allowed(name, moment))
        expected.train(facts, 3, 2, end=False, by_token=True, allowed=allowed)
        first = first or dict(asked.W)
        agree(method("crispedit").fit(asked), expected, replace(asked, W=first), 1e-3)
    shapes = {n: (16, 24) for n in names}
    assert {n: tuple(x.shape) for n, x in carried.items()} == method("crispedit").carries(shapes)


def earlier_facts(model: Any) -> Contexts:
    """As a session has them: rows that ask for the new object, here in two wordings."""
    c = build_contexts(model, TOKENIZER, as_facts(ALL, "x"), ["", "So. "])
    return rows_of(c, c.edit_rows)


def test_earlier_facts_curve_along_with_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each label is taken to be the likeliest token, so that there is no chance in it; the bare prompts count."""
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, *_, **__: probabilities.argmax(-1, keepdim=True))
    model = pico("llama", **SMALL)
    text = Moments(
        {"model.layers.1.mlp.down_proj": spd(24, 1).float()},
        {"model.layers.1.mlp.down_proj": spd(16, 2).float()},
        50,
        True,
        0.0,
    )
    asked = problem("crispedit", model, (1,), FACTS, moments=text, earlier=earlier_facts(model))
    ((name, (G, C)),) = curvatures(asked).items()
    naive, K, H = deepcopy(model).double().requires_grad_(False), [], []
    for ids, _ in answers(ALL, end=False):
        outs: list[Tensor] = []

        def hook(_: Any, args: Any, out: Tensor, outs: list[Tensor] = outs) -> None:
            K.extend(args[0][0].detach())
            out.requires_grad_()
            out.retain_grad()
            outs.append(out)

        handle = naive.get_submodule(name).register_forward_hook(hook)
        logits = naive(input_ids=ids[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
        handle.remove()
        H.extend(outs[0].grad[0])
    n = len(K)
    for found, mean, own in ((C, text.C[name], K), (G, text.G[name], H)):
        expected = (50 * mean.double() + sum(torch.outer(x, x) for x in own)) / (50 + n)
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    none = replace(asked, options={**asked.options, "earlier_facts": 0.0})
    assert torch.equal(curvatures(none)[name][1], text.C[name])
    seen: list[int] = []

    def moments_of(_: Any, __: Any, batch: Any, ___: int) -> Moments:
        seen.append(len(batch.input_ids))
        return text

    monkeypatch.setattr(crispedit, "moments_of", moments_of)
    curvatures(replace(asked, options={**asked.options, "earlier_facts": 2.0}))
    assert seen == [2]
