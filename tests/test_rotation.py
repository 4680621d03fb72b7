"""Orthogonal mathematics against definitions, in float64."""

from __future__ import annotations

import pytest
import torch

from mosectl.metrics import Spectrum, stability
from mosectl.rotation import (
    angles,
    compose,
    is_rotation,
    nearest_rotation,
    orthogonality_error,
    orthogonality_tolerance,
    rotate,
)


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


def test_is_rotation_knows_its_tolerance() -> None:
    R = nearest_rotation(random(64, 64)).float()
    assert is_rotation(R) and orthogonality_error(R) < orthogonality_tolerance(64)
    assert not is_rotation(R * 1.001) and not is_rotation(R.bfloat16().float())
    R[3, 5] = torch.nan
    assert not is_rotation(R)


def test_rotating_keeps_the_spectrum() -> None:
    R, W = nearest_rotation(random(24, 24)), random(24, 40, seed=2).float()
    s = stability("w", W, rotate(R, W))
    assert max(s.norm_drift, s.condition_drift, s.spectrum_drift) < 1e-6
    assert rotate(R, W).dtype == torch.float32
    far = stability("w", W, W * 2)
    assert far.norm_drift == pytest.approx(1) and far.condition_drift < 1e-6 and far.spectrum_drift == pytest.approx(1)


def test_compose_in_order_of_application() -> None:
    A, B = nearest_rotation(random(5, 5)), nearest_rotation(random(5, 5, seed=1))
    W = random(5, 9, seed=2)
    assert torch.allclose(compose([A, B]) @ W, B @ (A @ W))


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
