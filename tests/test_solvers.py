"""The closed form against its definition: no other rotation has a lower objective."""

from __future__ import annotations

import pytest
import torch

from mosectl.errors import UsageError
from mosectl.rotation import is_rotation, orthogonality_error
from mosectl.solvers import LayerProblem, method


def problem(
    d: int = 12, m: int = 4, samples: int = 200, seed: int = 0, **options: float
) -> tuple[LayerProblem, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    Y = torch.randn(d, samples, generator=g, dtype=torch.float64)
    H = torch.randn(d, m, generator=g, dtype=torch.float64)
    V = torch.randn(d, m, generator=g, dtype=torch.float64)
    V = V * H.norm(dim=0) / V.norm(dim=0)
    weight = torch.rand(m, generator=g, dtype=torch.float64) + 0.5
    settings = {**method("mose").defaults, **options}
    S = Y @ Y.T / samples
    return LayerProblem(S, torch.zeros(d, d, dtype=torch.float64), H, V, weight, settings), Y / samples**0.5


def objective(R: torch.Tensor, p: LayerProblem, Y: torch.Tensor) -> float:
    """λ‖R Y − Y‖² + Σ w ‖R h − v‖² (arXiv 2601.07873, eq. 15), summed over samples rather than through S."""
    kept = p.options["preserve"] * (R @ Y - Y).square().sum()
    return float(kept + ((R @ p.H - p.V).square() * p.weight).sum())


@pytest.mark.parametrize("preserve", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mose_minimises_the_paper_objective(preserve: float, seed: int) -> None:
    p, Y = problem(seed=seed, preserve=preserve, damping=0.0)
    R = method("mose").solve(p)
    assert orthogonality_error(R) < 1e-12 and is_rotation(R)
    best = objective(R, p, Y)
    g = torch.Generator().manual_seed(9)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            skew = torch.randn(12, 12, generator=g, dtype=torch.float64)
            assert objective(torch.linalg.matrix_exp(scale * (skew - skew.T)) @ R, p, Y) > best


def test_damping_keeps_untouched_directions_still() -> None:
    p, _ = problem(d=16, m=2)
    flat = LayerProblem(torch.zeros(16, 16), torch.zeros(16, 16), p.H, p.V, p.weight, p.options)
    R = method("mose").solve(flat)
    assert is_rotation(R)
    untouched = torch.linalg.qr(torch.cat([p.H, p.V, torch.randn(16, 12, dtype=torch.float64)], 1))[0][:, 4:]
    assert torch.allclose(R @ untouched, untouched, atol=1e-9), "the null space must not turn"


def test_earlier_edits_are_protected() -> None:
    p, _ = problem(d=16, m=2)
    h = torch.randn(16, 1, dtype=torch.float64)
    guarded = LayerProblem(p.S, 1000 * h @ h.T, p.H, p.V, p.weight, p.options)
    free, kept = method("mose").solve(p), method("mose").solve(guarded)
    assert (kept @ h - h).norm() < 0.05 * (free @ h - h).norm()


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"choose one of: .*mose"):
        method("rom")
