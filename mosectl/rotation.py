"""Rotations: build, check, compose, apply. All orthogonal mathematics lives here.

A rotation R has RᵀR = I and det R = +1. Multiplying an FFN output projection W (d, p) from the left, W' = R W, or from
both sides, W' = L W R, leaves every singular value of W, hence ‖W‖ and κ(W), what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_rotation(M: Tensor) -> Tensor:
    """The rotation that maximises tr(RᵀM): R = U Zᵀ of M = U Σ Zᵀ (Schönemann 1966), with det R = +1 (Kabsch 1976).

    Args:
        M: (d, d), any float type; solved in float64. Add μI beforehand if M may be rank-deficient, else R is not unique.
    Returns:
        R (d, d) float64 on M's device.
    """
    U, _, Zh = torch.linalg.svd(M.double())
    # The SVD's last pair costs least to flip: U Zᵀ with det −1 would be a reflection.
    U[:, -1] *= torch.linalg.det(U @ Zh).sign()
    return U @ Zh


def orthogonality_error(R: Tensor) -> float:
    """‖RᵀR − I‖_F / √d of R (d, d), computed in float64."""
    R = R.double()
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    return float(torch.linalg.norm(R.T @ R - eye) / len(R) ** 0.5)


def orthogonality_tolerance(d: int) -> float:
    """What a float32 R of size d may deviate: 10·d·eps."""
    return 10 * d * torch.finfo(torch.float32).eps


def is_rotation(R: Tensor) -> bool:
    """Finite, orthogonal to 10·d·eps and of determinant +1 (not a reflection)."""
    if not bool(torch.isfinite(R).all()) or orthogonality_error(R) > orthogonality_tolerance(len(R)):
        return False
    return bool(torch.linalg.slogdet(R.double())[0] > 0)


def thin_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, d), S (d,) descending, Zᵀ (d, p) of W (d, p) float64, d ≤ p; from W Wᵀ where its condition allows,
    which is faster: the error is then eps·κ(W)², below 1e-8.
    """
    if len(W) <= W.shape[1]:
        squares, U = torch.linalg.eigh(W @ W.T)
        squares, U = squares.flip(0), U.flip(1)
        if float(squares[-1]) > 1e-8 * float(squares[0]):
            S = squares.sqrt()
            return U, S, (U.T @ W) / S[:, None]
    return torch.linalg.svd(W, full_matrices=False)  # type: ignore[return-value]


def left_factor(W0: Tensor, W: Tensor) -> Tensor:
    """The rotation R (d, d) with R W0 = W, both (d, p) float64: nearest to the identity where W0 writes nothing."""
    return right_factor(W0.T, W.T).T


def right_factor(W0: Tensor, W: Tensor) -> Tensor:
    """The rotation R (p, p) with W0 R = W, both (d, p) float64: nearest to the identity on what W0 does not see."""
    U, S, Zh = torch.linalg.svd(W0, full_matrices=False)
    r = int((max(W0.shape) * torch.finfo(S.dtype).eps * S[0] < S).sum())
    return _completed(Zh[:r].T, (U[:, :r].T @ W / S[:r, None]).T)


def two_sided_factors(W0: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations L (d, d) and R (p, p) with L W0 R = W for two (d, p) float64 matrices of the same singular values.

    A singular vector's sign is free: each pair is turned to the nearer side, and the weakest one flipped where L would
    be a reflection otherwise.
    """
    U0, _, Z0h = torch.linalg.svd(W0, full_matrices=False)
    U, _, Zh = torch.linalg.svd(W, full_matrices=False)
    sign = ((U * U0).sum(0) + (Zh * Z0h).sum(1)).sign()
    sign[sign == 0] = 1
    U, Zh = U * sign, Zh * sign[:, None]
    if torch.linalg.det(U @ U0.T) < 0:
        U[:, -1], Zh[-1] = -U[:, -1], -Zh[-1]
    return U @ U0.T, _completed(Z0h.T, Zh.T)


def _completed(Z0: Tensor, Z: Tensor) -> Tensor:
    """The rotation R (p, p) with Z0ᵀ R = Zᵀ, Z0 and Z (p, r) orthonormal, nearest to the identity on Z0's complement."""
    r = Z0.shape[1]
    N0, N = (torch.linalg.qr(X, mode="complete")[0][:, r:] for X in (Z0, Z))
    A, _, Bh = torch.linalg.svd(N0.T @ N)
    R = Z0 @ Z.T + N0 @ (A @ Bh) @ N.T
    if N0.shape[1] and torch.linalg.det(R) < 0:
        A[:, -1] = -A[:, -1]
        R = Z0 @ Z.T + N0 @ (A @ Bh) @ N.T
    return R


def angles(R: Tensor) -> Tensor:
    """Rotation angles of R (d, d) in degrees, largest first, (d,): each turned plane gives its angle twice.

    The singular values of R − I are 2·sin(θ/2), which keeps small angles exact where acos would not.
    """
    eye = torch.eye(len(R), dtype=torch.float64, device=R.device)
    half_chords = torch.linalg.svdvals(R.double() - eye) / 2
    return torch.rad2deg(2 * torch.asin(half_chords.clamp(max=1)))
