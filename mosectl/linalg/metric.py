"""The metric of an edit, A = scale·(S Sᵀ) + N Nᵀ: S a triangular factor made once, N the few columns that come and go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mosectl.errors import EditFailed

EXACT = 8192  # up to this size a factor is float64; larger ones would take gigabytes more for digits that nobody sees


def root_of(C: Tensor, damping: float) -> Tensor:
    """The lower triangular S (p, p) with S Sᵀ = C + ``damping``·mean(diag C)·I, of C (p, p) positive semidefinite.

    float64 up to p = EXACT, float32 beyond. One (p, p) copy beside C is made.

    Raises:
        EditFailed: C is not positive semidefinite, even raised by a thousand times as much.
    """
    kind = torch.float64 if len(C) <= EXACT else torch.float32
    least = max(damping, 10 * len(C) * torch.finfo(kind).eps)
    for raised in sorted({damping or least, least, 10 * least, 100 * least, 1000 * least}):
        S = C.to(kind, copy=True)
        S.diagonal().add_(raised * S.diagonal().mean().clamp_min(1e-30))
        info = torch.empty((), dtype=torch.int32, device=S.device)
        torch.linalg.cholesky_ex(S, out=(S, info))
        if not bool(info):
            return S
    raise EditFailed("the second moments are not positive semidefinite", fix="take statistics of more text (--corpus)")


@dataclass(frozen=True)
class Metric:
    """A = scale·S Sᵀ + N Nᵀ (p, p), never formed: products and quotients with a few columns, in float64."""

    S: Tensor  # (p, p) lower triangular
    scale: float
    N: Tensor  # (p, n) float64

    @staticmethod
    def of(S: Tensor, scale: float, N: Tensor) -> Metric:
        """The columns N become part of the factor where they are so many that Woodbury's identity saves nothing."""
        if 2 * N.shape[1] <= len(S):
            return Metric(S, scale, N)
        A = (S @ S.T).mul_(scale).addmm_(N.to(S), N.T.to(S))
        return Metric(torch.linalg.cholesky(A), 1.0, N[:, :0])

    def times(self, X: Tensor) -> Tensor:
        """A X (p, k)."""
        whole = (self.S @ (self.S.T @ X.to(self.S))).to(X) * self.scale
        return whole + self.N @ (self.N.T @ X)

    def solve(self, X: Tensor) -> Tensor:
        """A⁻¹ X (p, k)."""
        Y = self._base_solve(X)
        if not self.N.shape[1]:
            return Y
        return Y - self._solved @ torch.cholesky_solve(self.N.T @ Y, self._inner)

    def _base_solve(self, X: Tensor) -> Tensor:
        return torch.cholesky_solve(X.to(self.S), self.S).to(X) / self.scale

    @cached_property
    def _solved(self) -> Tensor:
        return self._base_solve(self.N)  # (p, n)

    @cached_property
    def _inner(self) -> Tensor:
        """The factor of Woodbury's I + Nᵀ (scale·S Sᵀ)⁻¹ N (n, n)."""
        inner = self.N.T @ self._solved
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1)
        return torch.linalg.cholesky(inner)
