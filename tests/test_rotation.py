"""Orthogonal mathematics against definitions, in float64."""

from __future__ import annotations

import pytest
import torch

from mosectl.errors import BaseMismatch
from mosectl.linalg import rotation
from mosectl.linalg.rotation import (
    Compact,
    angles,
    apart,
    is_rotation,
    nearest_rotation,
    orthogonality_error,
    orthogonality_tolerance,
    polar,
    thin_svd,
    two_sided_factors,
)
from mosectl.linalg.spectrum import Spectrum, stability
from mosectl.patch.change import Change, change_between, changed, restored


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [2, 3, 8, 65])
def test_nearest_rotation_maximises_the_trace(d: int) -> None:
    M = random(d, d)
    R = nearest_rotation(M)
    assert orthogonality_error(R) < 1e-12 and torch.linalg.det(R) > 0
    best = float((R.T @ M).trace())
    for seed in range(20):  # no nearby rotation does better
        skew = random(d, d, seed=seed + 1)
        other = torch.linalg.matrix_exp(0.1 * (skew - skew.T)) @ R
        assert float((other.T @ M).trace()) < best


def test_reflection_becomes_the_rotation() -> None:
    M = torch.diag(torch.tensor([3.0, 2.0, -1.0]))
    R = nearest_rotation(M)
    assert torch.allclose(R, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert not is_rotation(torch.diag(torch.tensor([1.0, 1.0, -1.0])))


@pytest.mark.parametrize("d", [2, 3, 8, 65, 200])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_polar_factor_without_an_svd(d: int, condition: float) -> None:
    U, V = (torch.linalg.qr(random(d, d, seed=s))[0] for s in (1, 2))
    M = 7 * (U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)) @ V.T
    R = polar(M)
    assert R is not None and torch.equal(R, polar(M))
    assert orthogonality_error(R) < 1e-14 * d and orthogonality_error(R.float()) < orthogonality_tolerance(d)
    assert float((R - U @ V.T).norm()) < 1e-15 * condition * d + 1e-12


@pytest.mark.parametrize("spoil", ["singular", "nan", "infinite"])
def test_polar_factor_that_is_not_found_is_told(spoil: str) -> None:
    M = random(6, 6)
    if spoil == "singular":
        M[0] = 0
    else:
        M[0, 0] = torch.nan if spoil == "nan" else torch.inf
    with pytest.warns(UserWarning, match="did not converge"):
        assert polar(M) is None


def test_on_a_gpu_the_iteration_is_used_and_the_svd_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    M = random(9, 9)
    mirrored = M.clone()
    mirrored[0] *= -1  # of the two, one has its polar factor among the reflections
    wanted = [nearest_rotation(M), nearest_rotation(mirrored)]
    monkeypatch.setattr(rotation, "on_gpu", lambda _: True)
    for given, R in zip((M, mirrored), wanted, strict=True):
        assert torch.allclose(nearest_rotation(given), R, atol=1e-10)
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="did not converge"):
        assert is_rotation(nearest_rotation(flat))
    used = []
    monkeypatch.setattr(torch.linalg, "svd", lambda *_: used.append(1))
    nearest_rotation(torch.eye(4) + 0.1 * random(4, 4))
    assert not used


def test_is_rotation_knows_its_tolerance() -> None:
    R = nearest_rotation(random(64, 64)).float()
    assert is_rotation(R) and orthogonality_error(R) < orthogonality_tolerance(64)
    assert not is_rotation(R * 1.001) and not is_rotation(R.bfloat16().float())
    R[3, 5] = torch.nan
    assert not is_rotation(R)


def test_rotating_keeps_the_spectrum() -> None:
    R, W = nearest_rotation(random(24, 24)), random(24, 40, seed=2).float()
    s = stability("w", W, changed([Change({"R": R})], W))
    assert max(s.norm_drift, s.condition_drift, s.spectrum_drift) < 1e-6
    assert changed([Change({"R": R})], W).dtype == torch.float32
    far = stability("w", W, W * 2)
    assert far.norm_drift == pytest.approx(1) and far.condition_drift < 1e-6 and far.spectrum_drift == pytest.approx(1)


def turn(n: int, seed: int = 0, angle: float = 0.3) -> torch.Tensor:
    skew = angle * random(n, n, seed=seed)
    return torch.linalg.matrix_exp(skew - skew.T)


@pytest.mark.parametrize("side", ["output", "input", "both", "additive"])
@pytest.mark.parametrize("shape", [(6, 15), (8, 8)])
def test_change_between_leads_from_one_to_the_other_and_back(side: str, shape: tuple[int, int]) -> None:
    d, p = shape
    W0 = random(d, p)
    left, right = turn(d, 1) if side in ("output", "both") else torch.eye(d), turn(p, 2)
    W = W0 + random(d, 2, seed=3) @ random(2, p, seed=4) if side == "additive" else left.double() @ W0
    W = W @ right if side in ("input", "both") else W
    change = change_between(W0, W, side)
    assert torch.allclose(change.apply(W0), W, atol=1e-5) and torch.allclose(change.undo(W), W0, atol=1e-5)
    if side == "additive":
        assert change.factors["A"].shape == (2, p) and change.factors["B"].shape == (d, 2)
    else:
        assert all(is_rotation(R) for R in change.factors.values())


def test_changes_stack_in_order_and_come_off_again() -> None:
    W = random(5, 9)
    stack = [
        Change({"R": turn(5)}),
        Change({"A": random(2, 9, seed=1), "B": random(5, 2, seed=2)}),
        Change({"R": turn(5, 3), "R_in": turn(9, 4)}),
    ]
    by_hand = turn(5, 3) @ (turn(5) @ W + random(5, 2, seed=2) @ random(2, 9, seed=1)) @ turn(9, 4)
    assert torch.allclose(changed(stack, W), by_hand)
    assert torch.allclose(restored(stack, by_hand), W)


def test_two_sided_factors_leave_alone_what_need_not_turn() -> None:
    W0 = random(6, 20)
    L, R = two_sided_factors(W0, W0)
    assert torch.allclose(L, torch.eye(6).double(), atol=1e-9) and torch.allclose(R, torch.eye(20).double(), atol=1e-9)


def test_thin_svd_in_both_ways() -> None:
    for W in (random(7, 12), torch.diag(torch.tensor([1.0, 1e-7, 1e-9])).double() @ random(3, 5), random(12, 7)):
        U, S, Zh = thin_svd(W)
        assert torch.allclose(S, torch.linalg.svdvals(W), rtol=1e-9)
        assert torch.allclose((U * S) @ Zh, W, atol=1e-12)
        assert torch.allclose(Zh @ Zh.T, torch.eye(len(Zh)).double(), atol=1e-7)


def test_angles() -> None:
    t = torch.tensor(0.3)
    R = torch.eye(4)
    R[0, 0] = R[1, 1] = t.cos()
    R[0, 1], R[1, 0] = -t.sin(), t.sin()
    assert torch.allclose(angles(R), torch.rad2deg(torch.tensor([0.3, 0.3, 0, 0], dtype=torch.float64)), atol=1e-5)


def test_spectrum_of_wide_and_tall_large_matrices() -> None:
    W = random(1030, 1100)
    reference = torch.linalg.svdvals(W)
    for M in (W, W.T):
        assert torch.allclose(Spectrum.of(M).singular_values, reference, rtol=1e-8)


@pytest.mark.parametrize("shape", [(1030, 1030), (9000, 3), (1500, 1040)])
def test_errors_of_large_matrices_tile_by_tile(shape: tuple[int, int]) -> None:
    R = torch.linalg.qr(random(*shape))[0].float()
    R[3, 2] += 0.01
    expected = torch.linalg.norm(R.double().T @ R.double() - torch.eye(shape[1])) / shape[1] ** 0.5
    assert orthogonality_error(R) == pytest.approx(float(expected), rel=1e-9)


def test_distances_agree_in_every_form() -> None:
    g = [torch.linalg.qr(random(30, r, seed=r))[0] for r in (4, 5)]
    A, B = (Compact(U, nearest_rotation(random(U.shape[1], U.shape[1], seed=9))) for U in g)
    a, b, eye = A.dense(), B.dense(), torch.eye(30).double()
    for x, y, first, second in (
        (A, B, a, b), (A, b, a, b), (a, B, a, b), (a, b, a, b), (A, None, a, eye), (None, b, eye, b), (a, None, a, eye),
    ):  # fmt: skip
        assert apart(x, y) == pytest.approx(float((first - second).norm()) / 30**0.5)
    assert apart(A, A) == apart(a, a) == apart(None, None) == 0.0


def test_a_change_of_another_size_is_refused() -> None:
    W = random(5, 9)
    for factors in ({"R": turn(9)}, {"R_in": turn(5)}, {"A": random(2, 5), "B": random(9, 2)}):
        with pytest.raises(BaseMismatch, match=r"here is one of shape \[5, 9\]"):
            changed([Change(factors)], W)
