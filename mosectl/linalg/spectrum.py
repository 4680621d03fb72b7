"""Numbers that say whether a weight matrix is still healthy, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.errors import EditFailed


@dataclass(frozen=True)
class Spectrum:
    """Norm and singular values of one matrix W (d, p)."""

    norm: float  # Frobenius
    condition: float  # σ_max / σ_min
    singular_values: Tensor  # (min(d, p),) float64, descending

    @staticmethod
    def of(W: Tensor) -> Spectrum:
        """Of W (d, p), or of experts (experts, d, p) laid side by side; EditFailed where a number is not finite."""
        if not bool(torch.isfinite(W).all()):  # LAPACK would write about it to the standard output
            raise EditFailed("a weight became NaN or infinite", fix="try --dtype float32, or fewer facts at once")
        W = W.double()
        W = W.transpose(0, 1).flatten(1) if W.dim() == 3 else W  # experts side by side: (d, experts · p)
        W = W if W.shape[0] <= W.shape[1] else W.T
        # Large matrices by the Gram matrix's eigenvalues: relative error eps·κ², negligible here, at a tenth of the time.
        small = len(W) <= 1024
        sigma = torch.linalg.svdvals(W) if small else torch.linalg.eigvalsh(W @ W.T).clamp_min(0).sqrt().flip(0)
        return Spectrum(float(torch.linalg.norm(sigma)), float(sigma[0] / sigma[-1].clamp_min(1e-300)), sigma)


@dataclass(frozen=True)
class Stability:
    """How far an edit moved one matrix's norm, condition number and spectrum; drifts are relative."""

    name: str
    norm_before: float
    norm_after: float
    condition_before: float
    condition_after: float
    norm_drift: float
    condition_drift: float
    spectrum_drift: float  # max_i |σ'_i − σ_i| / σ_i


def stability(name: str, before: Tensor, after: Tensor) -> Stability:
    """Compare W before and after an edit, both (d, p), or (experts, d, p)."""
    a, b = Spectrum.of(before), Spectrum.of(after)
    drift = ((b.singular_values - a.singular_values).abs() / a.singular_values.clamp_min(1e-300)).max()
    return Stability(
        name=name,
        norm_before=a.norm,
        norm_after=b.norm,
        condition_before=a.condition,
        condition_after=b.condition,
        norm_drift=abs(b.norm / max(a.norm, 1e-300) - 1),
        condition_drift=abs(b.condition / max(a.condition, 1e-300) - 1),
        spectrum_drift=float(drift),
    )
