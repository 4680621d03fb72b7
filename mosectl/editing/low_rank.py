"""Compact rotations found in small subspaces from the start: L = I + U(Q − I)Uᵀ and R likewise, nearest to what is wanted.

On two sides no dense solution can be cut down afterwards: the pair (L, R) with L W R = W' is far from unique, and the one
that keeps W's spectrum exactly turns everything a little on either side. So the pair is sought where it shall be stored,
min ‖(L W R − T) A½‖ with T − W of the rank of the keys. The subspaces grow by stages: from what is still missing,
E = T − L W R, the strongest pairs e gᵀ in the metric A. Turning g into W⁺e makes a key along g write e, and the mirrored
pair W g → e on the left makes up for what that does to keys along W⁺e (the first-order solution of X W + W Y = e gᵀ for
skew X and Y). The spectrum is W's own at any rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.linalg.metric import EXACT, Metric
from mosectl.linalg.rotation import Compact, as_compact, compressed, left_factor, widened
from mosectl.linalg.small_turns import SmallTurns, coordinates
from mosectl.patch.change import Change, of_rotations

HELD = 0.98  # of the wanted change: half of the directions that hold as much of it are where the first stage begins
SHARE = 0.25  # of its rank that a later stage takes, for either side of a pair
GAIN = 0.02  # of what all stages have gained, below which a stage was the last
PROBES = 64  # directions among which the strongest are sought, at most
POWERS = 2  # of the residual, in that search


@dataclass(frozen=True)
class Wanted:
    """Δ = T − W (d, p) = F Gᵀ + M, never formed where M is None."""

    F: Tensor  # (d, n)
    G: Tensor  # (p, n)
    M: Tensor | None = None  # (d, p)
    AM: Tensor | None = None  # (p, d) A Mᵀ of the metric A, with M

    def right(self, X: Tensor) -> Tensor:
        """Δ X (d, k)."""
        found = self.F @ (self.G.T @ X)
        return found if self.M is None else found + self.M @ X

    def left(self, X: Tensor) -> Tensor:
        """Δᵀ X (p, k)."""
        found = self.G @ (self.F.T @ X)
        return found if self.M is None else found + self.M.T @ X


@dataclass(frozen=True)
class Gram:
    """W Wᵀ of W = L W₀ R: the factor is W₀'s."""

    root: Tensor  # (d, d) lower triangular
    left: Compact | Tensor | None = None  # L

    @staticmethod
    def of(W0: Tensor) -> Gram:
        """Of W₀ (d, p), raised by what its type cannot tell from nothing; float32 where it is large."""
        W = W0 if W0.shape[1] <= EXACT else W0.float()
        gram = W @ W.T
        gram.diagonal().add_(10 * torch.finfo(W.dtype).eps * gram.diagonal().mean() * len(W) ** 0.5)
        return Gram(torch.linalg.cholesky(gram))

    def solve(self, X: Tensor) -> Tensor:
        """(W Wᵀ)⁻¹ X (d, k)."""
        L = self.left
        if isinstance(L, Compact):
            return L.left(self._solve(L.inverse.left(X)))
        return self._solve(X) if L is None else L @ self._solve(L.T @ X)

    def _solve(self, X: Tensor) -> Tensor:
        """Without L."""
        return torch.cholesky_solve(X.to(self.root), self.root).to(X)


def nearest_turns(
    W: Tensor,
    wanted: Wanted,
    A: Metric,
    gram: Gram,
    *,
    gain: float = GAIN,
    most: float = float("inf"),
    done: Callable[[float], bool] | None = None,
    both: bool = True,
) -> tuple[Compact, Compact, float]:
    """L and R with L W R nearest to W + Δ in the metric A, and how much nearer: ‖Δ A½‖² less what is left of it.

    Args:
        W: (d, p) float64, of rank d. gram: W Wᵀ.
        gain: a stage that gains less than this share of what all have gained is the last.
        most: neither rank grows beyond it.
        done: of what was gained; no further stage where it is true.
        both: False leaves L the identity.
    """
    L, R, gained = Compact(W[:, :0], W[:0, :0]), Compact(W.T[:, :0], W[:0, :0]), 0.0
    B, m, Z = W[:, :0], W[:0, :0], W.T[:, :0]  # L W R − W = B m Zᵀ
    AZ, AG = Z, A.times(wanted.G)
    while True:
        e, g = _missing(wanted, B, m, Z, (AG, AZ), _stage(R.rank, most))
        if not e.shape[1]:
            return L, R, gained
        moved = W @ g + B @ (m @ (Z.T @ g))  # (d, k) what keys along g are turned away from
        writing = R.inverse.left(W.T @ gram.solve(L.inverse.left(e)))  # (p, k) keys that L W R writes e for
        U = widened(L.U, e, moved)[:, : _int(most, len(W))] if both else L.U
        V = widened(R.U, g, writing)[:, : _int(most, W.shape[1])]
        small, B, Z, AZ, nothing = _projected(W, wanted, A, U, V)
        Q, P, left = small.solve(_embedded(L.Q, U.shape[1]), _embedded(R.Q, V.shape[1]))
        grown = V.shape[1] > R.rank
        L, R, before, gained = Compact(U, Q), Compact(V, P), gained, nothing - left
        m = _inner(small, L, R)
        if not grown or gained - before < gain * gained or (done and done(gained)):
            return L, R, gained


def _int(most: float, size: int) -> int:
    return int(min(most, size))


def _stage(rank: int, most: float) -> Callable[[Tensor], int]:
    """How many pairs the next stage takes, of these strengths (descending)."""

    def count(strength: Tensor) -> int:
        shares = strength.cumsum(0) / strength.sum()
        k = rank * SHARE if rank else (1 + int((shares < HELD).sum())) / 2
        room = (most - rank + 1) / 2
        return int(min(max(2, k), room, len(strength)))

    return count


def _missing(
    wanted: Wanted, B: Tensor, m: Tensor, Z: Tensor, measured: tuple[Tensor, Tensor],
    count: Callable[[Tensor], int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of E = Δ − B m Zᵀ the strongest pairs in the metric A: unit e (d, k) and g = Eᵀe (p, k).

    By subspace iteration with E A Eᵀ from a fixed random start.

    Args:
        measured: A G (p, n) of Δ's G, and A Z.
    """
    AG, AZ = measured

    def transposed(Y: Tensor) -> Tensor:
        return wanted.left(Y) - Z @ (m.T @ (B.T @ Y))

    def weighed(Y: Tensor) -> Tensor:  # A Eᵀ Y: A itself is large
        found = AG @ (wanted.F.T @ Y) - AZ @ (m.T @ (B.T @ Y))
        return found if wanted.AM is None else found + wanted.AM @ Y

    d = len(B)
    n = min(d, PROBES if wanted.M is not None else min(PROBES, wanted.F.shape[1] + B.shape[1]))
    Y = torch.randn(d, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(B)
    for _ in range(POWERS):
        T = weighed(Y)
        Y = torch.linalg.qr(wanted.right(T) - B @ (m @ (Z.T @ T)))[0]
    T = transposed(Y)
    strength, vectors = torch.linalg.eigh(T.T @ weighed(Y))
    strength, vectors = strength.flip(0).clamp_min(0), vectors.flip(1)
    if not bool(strength[:1] > 0):
        return Y[:, :0], T[:, :0]
    k = count(strength)
    return Y @ vectors[:, :k], T @ vectors[:, :k]


def _projected(
    W: Tensor, wanted: Wanted, A: Metric, U: Tensor, V: Tensor
) -> tuple[SmallTurns, Tensor, Tensor, Tensor, float]:
    """The problem for rotations of span(U), span(V); B = [U, W V], Z = [WᵀU, V], A Z, and its square at the identities."""
    b, a = W @ V, W.T @ U
    B, Z = torch.cat([U, b], 1), torch.cat([a, V], 1)
    AZ = A.times(Z)
    (left, out), (right, read) = coordinates(B, B.T @ B), coordinates(Z, Z.T @ AZ)
    D = out @ (B.T @ wanted.right(AZ)) @ read.T
    r = U.shape[1]
    host = torch.device("cpu")  # hundreds of small products: a GPU would only wait
    parts = [x.to(host) for x in (left[:, :r], left[:, r:], right.T[:r], right.T[r:], U.T @ b, D)]
    return SmallTurns(*parts), B, Z, AZ, float(D.square().sum())


def _inner(small: SmallTurns, L: Compact, R: Compact) -> Tensor:
    """m (r + s, r + s) with L W R − W = [U, W V] m [WᵀU, V]ᵀ."""
    X, Y = L.turn, R.turn
    nothing = X.new_zeros(len(Y), len(X))
    return torch.cat([torch.cat([X, X @ small.c.to(X) @ Y], 1), torch.cat([nothing, Y], 1)])


def _embedded(Q: Tensor, n: int) -> Tensor:
    """Q (r, r) in the corner of an identity (n, n), on the host."""
    Q = Q.cpu()
    return torch.block_diag(Q, torch.eye(n - len(Q)).to(Q))


def compact_change(W0: Tensor, W: Tensor, A: Tensor, side: str, tolerance: float) -> tuple[Change, float] | None:
    """Low-rank rotations that do what leads from W0 to W, both (d, p) float64, and what is left over.

    None where they would take as many numbers as dense ones.

    Args:
        A: (p, p) second moment of the keys that count, positive definite.
        side: "output", "input" or "both".
        tolerance: on ‖(W_c − W) A½‖ / ‖(W − W0) A½‖.
    """
    left: Compact | None
    right: Compact | None
    if side == "output":
        c, error = compressed(as_compact(left_factor(W0, W)), W0 @ A @ W0.T, tolerance)
        left, right = c, None
    else:
        left, right, error = _fitted(W0, W, A, side == "both", tolerance)
    held = [c for c in (left, right) if c]
    if error > tolerance or sum(c.rank * (len(c.U) + c.rank) for c in held) >= sum(len(c.U) ** 2 for c in held):
        return None
    return of_rotations(left, right), error


def _fitted(W0: Tensor, W: Tensor, A: Tensor, both: bool, tolerance: float) -> tuple[Compact | None, Compact, float]:
    """Compact L and R with L W0 R ≈ W; ranks grow until the tolerance is met, or the pair is no smaller than dense ones."""
    E = W - W0
    whole = float(((E @ A) * E).sum())
    if not whole > 0:
        one = torch.ones(1, 1).to(W)
        return Compact(torch.eye(len(W))[:, :1].to(W), one), Compact(torch.eye(W.shape[1])[:, :1].to(W), one), 0.0
    metric = Metric(torch.linalg.cholesky(A), 1.0, W.T[:, :0])
    L, R, gained = nearest_turns(
        W0, Wanted(W[:, :0], W.T[:, :0], E, A @ E.T), metric, Gram.of(W0), gain=0.0, most=W.shape[1] / 2,
        done=lambda gained: whole - gained <= tolerance**2 * whole, both=both,
    )  # fmt: skip
    return (L if both else None), R, max(0.0, 1 - gained / whole) ** 0.5
