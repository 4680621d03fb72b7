"""Shapes and types of what the mathematics takes and gives: wide and tall weights, one fact and many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import mosectl
from mosectl.editing.methods import built_in, method
from mosectl.editing.methods.base import LayerProblem
from mosectl.patch.change import SIDES, Change
from support import shapes
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico
from support.problems import problem, random

WEIGHTS = [(10, 24), (24, 10), (8, 8), (1, 6), (6, 1)]
TYPES = [torch.float64, torch.float32, torch.bfloat16]
SOLVERS = [name for name in built_in() if method(name).searches]


def compact(n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    U = torch.linalg.qr(random(n, r, seed=seed))[0]
    return U, shapes.nearest_rotation(random(r, r, seed=seed + 1))


def turned(d: int, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (d, p), rotations L and R near the identity, and L W R."""
    L, R = (shapes.nearest_rotation(torch.eye(n).double() + 0.1 * random(n, n, seed=n)) for n in (d, p))
    W = random(d, p)
    return W, L, R, L @ W @ R


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_rotations(n: int, dtype: torch.dtype) -> None:
    R = shapes.nearest_rotation(random(n, n).to(dtype))
    assert shapes.is_rotation(R) and shapes.orthogonality_error(R) < 1e-12
    assert shapes.polar(R) is not None
    shapes.angles(R.to(dtype))


@pytest.mark.parametrize(("d", "p"), WEIGHTS)
def test_factors(d: int, p: int) -> None:
    W, L, R, _ = turned(d, p)
    shapes.thin_svd(W)
    shapes.product_svd(random(d, 3), random(3, p))
    assert torch.allclose(shapes.left_factor(W, L @ W) @ W, L @ W)
    assert torch.allclose(W @ shapes.right_factor(W, W @ R), W @ R)


@pytest.mark.parametrize(("d", "p"), WEIGHTS)
def test_factors_of_both_sides(d: int, p: int) -> None:
    W, _, _, after = turned(d, p)
    L, R = shapes.two_sided_factors(W, after)
    assert shapes.is_rotation(L) and shapes.is_rotation(R) and torch.allclose(L @ W @ R, after)


@pytest.mark.parametrize(("n", "r"), [(9, 1), (9, 4), (9, 9), (1, 1)])
def test_compact_rotations(n: int, r: int) -> None:
    one, two = compact(n, r), compact(n, 1, seed=5)
    shapes.left(*one, random(n, 3))
    shapes.right(*one, random(3, n))
    assert shapes.is_rotation(shapes.dense(*one))
    shapes.product(*one, *two)
    X = random(n, 3 * n)
    shapes.compressed(*one, X @ X.T, 0.3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("d", "p"), WEIGHTS)
def test_spectra(d: int, p: int, dtype: torch.dtype) -> None:
    W = random(d, p).to(dtype)
    shapes.singular_values(W)
    shapes.stability(W, 2 * W)
    experts = torch.stack([W, -W, W])
    shapes.singular_values_of_experts(experts)
    shapes.stability(experts, experts)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("d", "p"), WEIGHTS)
@pytest.mark.parametrize("side", SIDES)
def test_changes(side: str, d: int, p: int, dtype: torch.dtype) -> None:
    W, L, R, _ = turned(d, p)
    after = {"output": L @ W, "input": W @ R, "both": L @ W @ R, "additive": W + random(d, 1) @ random(1, p)}[side]
    change = shapes.change_between(W, after, side)
    for x in (W.to(dtype), torch.stack([W, 2 * W]).to(dtype)):
        out = shapes.changed([change], x)
        assert out.dtype == dtype and shapes.restored([change], out).dtype == dtype
    U, Q = compact(d, 1)
    small = shapes.fits(Change({"U": U.float(), "Q": Q.float()}), W)
    shapes.changed([small], W.to(dtype))


@pytest.mark.parametrize("m", [1, 7, 30])
@pytest.mark.parametrize(("d", "p"), WEIGHTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name: str, d: int, p: int, m: int) -> None:
    asked = problem(name, m=m, d=d, p=p)
    found = shapes.solve(name, replace(asked, C=asked.C.float()))  # statistics are kept as float32
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("name", ["mose", "prune"])  # a target a layer, and one spread over the layers
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # (d, p) in memory, and (p, d)
def test_what_an_edit_asks_of_its_method(
    model_type: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[LayerProblem] = []
    real, kind = method(name).update, type(method(name))

    def update(self: object, problem: LayerProblem) -> Tensor:
        asked.append(problem)
        with monkeypatch.context() as m:
            m.setattr(kind, "update", lambda _, problem: real(problem))
            return shapes.solve(name, problem)

    monkeypatch.setattr(kind, "update", update)
    (tmp_path / "corpus.txt").write_text(CORPUS)
    options = few(str(tmp_path / "corpus.txt"), method=name, guard=0)
    result = mosectl.edit(FACTS, pico(model_type), make_tokenizer(), options=options, refuse=False)
    assert asked and all(tuple(p.W.shape) == (32, 48) for p in asked)
    for change in result.patch.changes.values():
        shapes.fits(change, torch.zeros(32, 48))


WRONG: dict[str, Any] = {
    "W": random(24, 10), "W0": random(10, 23), "C": random(10, 10), "P": random(24, 1), "Q": random(24, 10),
    "K": random(4, 24), "V": random(10, 1), "weight": torch.ones(1).double(),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_shape_is_caught(field: str) -> None:
    with pytest.raises(TypeCheckError):
        shapes.solve("mose", replace(problem("mose"), **{field: WRONG[field]}))


def test_wrong_types_and_results_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem("mose")
    with pytest.raises(TypeCheckError):
        shapes.solve("mose", replace(asked, W=asked.W.float()))
    with pytest.raises(TypeCheckError):
        shapes.left(*compact(9, 2), random(8, 3))
    with pytest.raises(TypeCheckError):
        shapes.fits(Change({"A": torch.ones(3, 24), "B": torch.ones(10, 2)}), asked.W)
    monkeypatch.setattr(shapes.rotation, "angles", lambda R: R)
    with pytest.raises(TypeCheckError):
        shapes.angles(random(4, 4))
