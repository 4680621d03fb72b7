"""Compact rotations sought from the start: against dense algebra, and against the dense solution of the same problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mosectl.editing.low_rank import Gram, Wanted, nearest_turns
from mosectl.editing.methods import isospectral, method
from mosectl.editing.methods.base import Columns, LayerProblem, Still, Turner, TurnProblem
from mosectl.editing.turns import LayerTurns, from_tensors
from mosectl.errors import EditFailed
from mosectl.linalg import metric
from mosectl.linalg.metric import Metric, root_of
from mosectl.linalg.rotation import Compact, is_rotation
from mosectl.linalg.small_turns import SmallTurns, coordinates
from mosectl.patch.change import of_rotations
from support.problems import problem, random

OPTIONS = method("isospectral").defaults


def second_moment(p: int, seed: int = 1) -> Tensor:
    X = random(p, 3 * p, seed=seed)
    return X @ X.T / (3 * p)


# The metric


@pytest.mark.parametrize("form", ["none", "compact", "dense"])
def test_gram_of_a_turned_weight(form: str) -> None:
    """L in the form that a run's batches leave: compact at first, dense after many of them."""
    W, X = random(8, 20), random(8, 3, seed=2)
    U = torch.linalg.qr(random(8, 3, seed=3))[0]
    turned = Compact(U, torch.linalg.matrix_exp(torch.tensor([[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]).double() / 4))
    L = {"none": None, "compact": turned, "dense": turned.dense()}[form]
    now = W if L is None else turned.left(W)
    assert torch.allclose(Gram(Gram.of(W).root, L).solve(X), torch.linalg.solve(now @ now.T, X), rtol=1e-9)


@pytest.mark.parametrize("columns", [0, 3, 20])
def test_metric_is_the_dense_matrix(columns: int) -> None:
    """20 of 24 columns go into the factor, 3 through Woodbury's identity."""
    C, N, X = second_moment(24), random(24, columns, seed=2), random(24, 5, seed=3)
    A = Metric.of(root_of(C, 1e-4), 7.0, N)
    dense = 7 * (C + 1e-4 * C.diagonal().mean() * torch.eye(24)) + N @ N.T
    assert torch.allclose(A.times(X), dense @ X, rtol=1e-10)
    assert torch.allclose(A.solve(X), torch.linalg.solve(dense, X), rtol=1e-8)


def test_a_large_factor_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "EXACT", 8)
    S = root_of(second_moment(24), 1e-4)
    assert S.dtype == torch.float32
    A, X = Metric.of(S, 1.0, random(24, 2, seed=5)), random(24, 3, seed=6)
    assert A.times(X).dtype == torch.float64 and torch.allclose(A.solve(A.times(X)), X, atol=1e-3)


def test_a_moment_of_few_keys_is_raised_and_a_negative_one_refused() -> None:
    X = random(24, 3, seed=4)
    assert torch.isfinite(root_of(X @ X.T, 0.0)).all(), "of rank 3: raised by what rounding leaves"
    with pytest.raises(EditFailed, match="not positive semidefinite"):
        root_of(-second_moment(24), 1e-4)


# The small problem


def small(seed: int, k: int = 7, r: int = 3, s: int = 4) -> SmallTurns:
    u = torch.linalg.qr(random(k, r, seed=seed))[0]
    b, v, X = random(k, s, seed=seed + 1), random(s, k, seed=seed + 2), 0.3 * random(k, k, seed=seed + 3)
    return SmallTurns(u, b, random(r, k, seed=seed + 4), v, u.T @ b, X)


@pytest.mark.parametrize("seed", range(5))
def test_small_turns_are_rotations_at_a_minimum(seed: int) -> None:
    problem = small(seed)
    eyes = torch.eye(3).double(), torch.eye(4).double()
    Q, P, cost = problem.solve(*eyes)
    assert is_rotation(Q) and is_rotation(P)
    assert cost == pytest.approx(problem.at(Q, P).cost) and cost < problem.at(*eyes).cost
    for i in range(10):  # no small turn of either is much better
        x, y = random(3, 3, seed=i), random(4, 4, seed=i + 20)
        near = problem.at(torch.matrix_exp(0.01 * (x - x.T)) @ Q, P @ torch.matrix_exp(0.01 * (y - y.T)))
        assert near.cost > 0.999 * cost


def test_derivatives_are_those_of_finite_differences() -> None:
    here = small(3).at(torch.matrix_exp(random(3, 3) - random(3, 3).T), torch.matrix_exp(random(4, 4) - random(4, 4).T))
    x, y = (1e-6 * (z - z.T) for z in (random(3, 3, seed=8), random(4, 4, seed=9)))
    there = here.problem.at(torch.matrix_exp(x) @ here.Q, here.P @ torch.matrix_exp(y))
    assert torch.allclose(there.residual - here.residual, here.change(x, y), atol=1e-10)
    gx, gy = here.gradient(here.residual)
    assert there.cost - here.cost == pytest.approx(2 * float((gx * x).sum() + (gy * y).sum()), rel=1e-4)


def test_dependent_columns_have_coordinates_too() -> None:
    B = random(9, 4)
    B = torch.cat([B, B[:, :2] + B[:, 2:]], 1)
    X, Y = coordinates(B, B.T @ B)
    basis = B @ Y.T
    assert X.shape == (4, 6) and torch.allclose(basis.T @ basis, torch.eye(4).double(), atol=1e-6)
    assert torch.allclose(basis @ X, B, atol=1e-6)


# The search


def turned(p: LayerProblem, **options: float) -> tuple[Tensor, Compact, Compact]:
    solver = method("isospectral")
    assert isinstance(solver, Turner)
    root = root_of(p.C, OPTIONS["damping"])
    still = Still(root, p.options["preserve"], p.W0)
    asked = TurnProblem(p.W, still, Gram.of(p.W0), Columns(p.K, p.V, p.weight), {**p.options, **options})
    L, R = solver.turns(asked)
    return R.right(L.left(p.W)), L, R


def objective(p: LayerProblem, X: Tensor) -> float:
    """λ‖(X − W₀)C½‖² + Σ w ‖X k − v‖²."""
    C = p.C + OPTIONS["damping"] * p.C.diagonal().mean() * torch.eye(len(p.C))
    kept = ((X - p.W0) @ C * (X - p.W0)).sum()
    return float(p.options["preserve"] * kept + ((X @ p.K - p.V).square() * p.weight).sum())


@pytest.mark.parametrize("seed", range(4))
def test_compact_turns_reach_nearly_what_the_dense_solution_reaches(seed: int) -> None:
    p = problem("isospectral", m=4, d=40, p=100, seed=seed, preserve=1.0)
    W, L, R = turned(p, rank_gain=0.0)
    dense, base = objective(p, method("isospectral").update(p)), objective(p, p.W0)
    assert torch.allclose(torch.linalg.svdvals(W), torch.linalg.svdvals(p.W0), rtol=1e-10)
    assert is_rotation(L.dense()) and is_rotation(R.dense())
    assert base - objective(p, W) > 0.9 * (base - dense)


def test_rank_is_what_it_pays_and_never_more_than_asked() -> None:
    p = problem("isospectral", m=4, d=40, p=100, preserve=1.0)
    _, _, small = turned(p, rank_gain=0.3)
    _, _, large = turned(p, rank_gain=0.0)
    W, left, right = turned(p, rank=5)
    assert small.rank < large.rank and max(left.rank, right.rank) <= 5
    assert objective(p, W) < objective(p, p.W0)


def test_nothing_wanted_nothing_turned() -> None:
    p = problem("isospectral", m=2)
    L, R, gained = nearest_turns(
        p.W, Wanted(p.V * 0, p.K), Metric(root_of(p.C, 1e-4), 1.0, p.K), Gram.of(p.W)
    )  # fmt: skip
    assert gained == 0 and L.rank == R.rank == 0


# A layer's run


def columns(d: int, p: int, seed: int) -> Columns:
    K = random(p, 2, seed=seed)
    return Columns(K, 0.5 * random(d, 2, seed=seed + 1), torch.ones(2).double())


def sums(of: Columns) -> tuple[Tensor, Tensor]:
    """What a layer is told of earlier edits."""
    weighted = (of.K * of.weight).T
    return of.K @ weighted, of.V @ weighted


def test_what_is_sought_in_a_later_batch_is_the_best_for_all_its_parts() -> None:
    """Without the spectrum, T is where ordinary text, earlier edits and the batch pull alike, whatever was turned before."""
    p, solver, seen = problem("isospectral", m=3, d=20, p=50, preserve=0.7), method("isospectral"), []
    assert isinstance(solver, Turner)
    earlier = Columns(random(50, 4, seed=7), 0.5 * random(20, 4, seed=8), torch.rand(4).double())
    run = LayerTurns("layer", p.W0)
    run.solve(solver, {"layer": p.C}, columns(20, 50, 20), None, 1.0, p.options)
    begun, keep = run.keep(), 0.4
    with pytest.MonkeyPatch.context() as m:
        m.setattr(isospectral, "nearest_turns", lambda *a, **k: seen.append(a) or nearest_turns(*a, **k))
        run.solve(solver, {}, Columns(p.K, p.V, p.weight), sums(earlier), keep, p.options)
    W, wanted, A, _ = seen[0]
    C = p.C + p.options["damping"] * p.C.diagonal().mean() * torch.eye(50)
    whole = keep * (p.options["preserve"] * C + sums(earlier)[0]) + (p.K * p.weight) @ p.K.T
    pull = keep * (p.options["preserve"] * p.W0 @ C + sums(earlier)[1]) + (p.V * p.weight) @ p.K.T
    best, eye = pull @ torch.linalg.inv(whole), torch.eye(50).double()
    assert torch.equal(W, begun) and torch.allclose(W + wanted.right(eye), best, atol=1e-6)
    assert torch.allclose(A.times(eye), whole, atol=1e-8)
    assert torch.allclose(wanted.AM, whole @ wanted.M.T, atol=1e-7)


def test_batches_add_up_to_one_pair_of_rotations() -> None:
    solver, W0, C = method("isospectral"), random(20, 50) / 7, {"layer": second_moment(50)}
    assert isinstance(solver, Turner)
    run = LayerTurns("layer", W0)
    first = columns(20, 50, 10)
    run.solve(solver, C, first, None, 1.0, OPTIONS)
    assert not C, "its factor is kept instead"
    kept = run.keep()
    assert torch.equal(run.turned(), kept) and run.pair is None, "the next batch begins there"
    dropped = run.solve(solver, C, columns(20, 50, 20), sums(first), 1.0, OPTIONS)
    run.pair = None
    assert not torch.equal(dropped, kept) and torch.equal(run.turned(), kept)
    run.solve(solver, C, columns(20, 50, 30), sums(first), 1.0, OPTIONS)
    W = run.keep()
    made = of_rotations(*run.factors("both")).apply(W0)
    assert torch.allclose(made, W, atol=1e-5) and torch.allclose(
        torch.linalg.svdvals(W), torch.linalg.svdvals(W0), rtol=1e-10
    )
    again = LayerTurns("layer", W0)
    assert torch.equal(again.take(*from_tensors(run.tensors())), W), "as a resumed run has it"


def test_earlier_facts_keep_still_more_the_more_they_weigh() -> None:
    p = problem("isospectral", m=2, d=20, p=50, preserve=0.1)
    earlier = Columns(p.K + 0.3 * random(50, 2, seed=5), p.W @ (p.K + 0.3 * random(50, 2, seed=5)), p.weight)
    moved = []
    for weight in (0.0, 100.0):
        run = LayerTurns("layer", p.W0)
        solver = method("isospectral")
        assert isinstance(solver, Turner)
        facts = Columns(p.K, p.V, p.weight)
        before = sums(replace(earlier, weight=weight * p.weight))
        W = run.solve(solver, {"layer": p.C}, facts, before, 1.0, p.options)
        moved.append(float((W @ earlier.K - earlier.V).norm()))
    assert moved[1] < 0.7 * moved[0]


def test_an_identity_has_a_patch_form() -> None:
    W0 = random(6, 9)
    change = of_rotations(*LayerTurns("layer", W0).factors("both"))
    assert change.side() == "both" and torch.equal(change.apply(W0), W0)


def test_on_the_output_side_both_rotations_are_one() -> None:
    """A mixture's layer is turned as a whole: W₀ is the identity there."""
    solver, run = method("isospectral"), LayerTurns("layer", torch.eye(12).double())
    assert isinstance(solver, Turner)
    W = run.solve(solver, {"layer": second_moment(12)}, columns(12, 12, 3), None, 1.0, OPTIONS)
    run.keep()
    change = of_rotations(*run.factors("output"))
    assert change.side() == "output" and torch.allclose(change.apply(run.W0), W, atol=1e-5)
