"""Rotations: build, check, compose, apply. All orthogonal mathematics lives here.

A rotation R is a (d, d) float32 tensor with RᵀR = I and det R = +1. It multiplies an FFN output projection W (d, p)
from the left, W' = R W, which leaves every singular value of W, hence ‖W‖ and κ(W), what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def compose(rotations: Sequence[Tensor]) -> Tensor:
    """R_n … R_2 R_1 in float64 for rotations given in the order they are applied, each (d, d)."""
    product = rotations[0].double()
    for R in rotations[1:]:
        product = R.double() @ product
    return product


def rotate(R: Tensor, W: Tensor) -> Tensor:
    """R W, computed in float64 on R's device and rounded once to W's dtype, on W's device. R (d, d), W (d, p)."""
    return (R.double() @ W.to(R.device).double()).to(W.device, W.dtype)


def angles(R: Tensor) -> Tensor:
    """Rotation angles of R (d, d) in degrees, largest first, (d,): each turned plane gives its angle twice.

    The singular values of R − I are 2·sin(θ/2), which keeps small angles exact where acos would not.
    """
    eye = torch.eye(len(R), dtype=torch.float64, device=R.device)
    half_chords = torch.linalg.svdvals(R.double() - eye) / 2
    return torch.rad2deg(2 * torch.asin(half_chords.clamp(max=1)))
