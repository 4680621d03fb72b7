"""Rotations: build, check, compose, apply. All orthogonal mathematics lives here.

A rotation R has RᵀR = I and det R = +1. Multiplying an FFN output projection W (d, p) from the left, W' = R W, or from
both sides, W' = L W R, leaves every singular value of W, hence ‖W‖ and κ(W), what it was.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.errors import Notice

TILE = 1024  # rows or columns worked on at once where a copy in float64 would be large


def nearest_rotation(M: Tensor) -> Tensor:
    """The rotation that maximises tr(RᵀM): R = U Zᵀ of M = U Σ Zᵀ (Schönemann 1966), with det R = +1 (Kabsch 1976).

    Args:
        M: (d, d), any float type; solved in float64. Add μI beforehand if M may be rank-deficient, else R is not unique.
    Returns:
        R (d, d) float64 on M's device.
    """
    M = M.double()
    if on_gpu(M) and (R := polar(M)) is not None and bool(torch.linalg.det(R) > 0):
        return R
    U, _, Zh = torch.linalg.svd(M)
    # The SVD's last pair costs least to flip: U Zᵀ with det −1 would be a reflection.
    U[:, -1] *= torch.linalg.det(U @ Zh).sign()
    return U @ Zh


def on_gpu(M: Tensor) -> bool:
    """Where an SVD is slow."""
    return M.is_cuda


def polar(M: Tensor, steps: int = 20) -> Tensor | None:
    """The orthogonal polar factor (d, d) of M (d, d) float64 without an SVD, which GPUs are slow at; None, and a warning,
    where the iteration does not converge.

    Newton's X ← (γX + (γX)⁻ᵀ)/2 with γ from the 1- and ∞-norms (Higham 1986, doi 10.1137/0907079), and as soon as X is
    nearly orthogonal Newton-Schulz' X ← X(3I − XᵀX)/2, which is products only. Both converge quadratically.
    """
    X, eye = M / torch.linalg.norm(M), torch.eye(len(M), dtype=M.dtype, device=M.device)
    for _ in range(steps):
        E = eye - X.T @ X
        apart = float(torch.linalg.norm(E))
        if apart < 0.3:
            X = X + 0.5 * X @ E
            if apart < 1e-7:  # what is left after this step is its square
                return X
            continue
        inverse, info = torch.linalg.inv_ex(X)
        if bool(info) or not apart < float("inf"):
            break
        Y = inverse.T
        size = [A.abs().sum(0).max() * A.abs().sum(1).max() for A in (Y, X)]
        scale = (size[0] / size[1]) ** 0.25
        X = (scale * X + Y / scale) / 2
    warnings.warn("a polar factor was found by SVD: Newton's iteration did not converge", Notice, stacklevel=2)
    return None


def orthogonality_error(R: Tensor) -> float:
    """‖RᵀR − I‖_F / √r of the columns of R (n, r), computed in float64, a tile of RᵀR at a time."""
    columns, square = R.split(TILE, 1), 0.0
    for i, left in enumerate(columns):
        for j, right in enumerate(columns[i:]):
            rows = zip(left.split(8 * TILE), right.split(8 * TILE), strict=True)
            G = sum((a.double().T @ b.double() for a, b in rows), torch.zeros(()).to(R.device))
            if j == 0:
                G.diagonal().sub_(1)
            square += float(G.square().sum()) * (1 if j == 0 else 2)  # RᵀR is symmetric
    return (square / R.shape[1]) ** 0.5


def orthogonality_tolerance(d: int) -> float:
    """What a float32 R of size d may deviate: 10·d·eps."""
    return 10 * d * torch.finfo(torch.float32).eps


def is_rotation(R: Tensor) -> bool:
    """Finite, orthogonal to 10·d·eps and of determinant +1 (not a reflection)."""
    if not bool(torch.isfinite(R).all()) or orthogonality_error(R) > orthogonality_tolerance(len(R)):
        return False
    # In float32: next to a matrix with singular values 1 there is none of another sign.
    return bool(torch.linalg.slogdet(R.float())[0] > 0)


def thin_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, d), S (d,) descending, Zᵀ (d, p) of W (d, p) float64, d ≤ p; from W Wᵀ where its condition allows,
    which is faster: the error is then eps·κ(W)², below 1e-8.
    """
    if len(W) <= W.shape[1]:
        squares, U = torch.linalg.eigh(W @ W.T)
        squares, U = squares.flip(0), U.flip(1)
        if float(squares[-1]) > 1e-8 * float(squares[0]):
            S = squares.sqrt()
            return U, S, (U.T @ W).div_(S[:, None])
    return torch.linalg.svd(W, full_matrices=False)  # type: ignore[return-value]


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, k), S (k,) descending, Zᵀ (k, p) of B A for B (d, r), A (r, p), without the (d, p) product where r is low."""
    (Q, S), (P, T) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, values, Zh = torch.linalg.svd(S @ T.T, full_matrices=False)
    return Q @ U, values, Zh @ P.T


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

    A singular vector's sign is free: each pair is turned to the nearer side, and the weakest one flipped where the smaller
    of the two (L if d = p) would be a reflection otherwise.
    """
    U0, _, Z0h = torch.linalg.svd(W0, full_matrices=False)
    U, _, Zh = torch.linalg.svd(W, full_matrices=False)
    sign = ((U * U0).sum(0) + (Zh * Z0h).sum(1)).sign()
    sign[sign == 0] = 1
    U, Zh = U * sign, Zh * sign[:, None]
    wide = len(W) <= W.shape[1]
    if torch.linalg.det(U @ U0.T if wide else Zh @ Z0h.T) < 0:
        U[:, -1], Zh[-1] = -U[:, -1], -Zh[-1]
    return U @ U0.T if wide else _completed(U0, U).T, _completed(Z0h.T, Zh.T)


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


@dataclass(frozen=True)
class Compact:
    """R = I + U (Q − I) Uᵀ, a rotation that turns the span of U and nothing else: orthogonal at any rank r.

    It takes n·r + r² numbers instead of n², and (R − I) W has rank r.
    """

    U: Tensor  # (n, r) orthonormal columns
    Q: Tensor  # (r, r) a rotation

    @property
    def rank(self) -> int:
        """How many directions it turns among themselves, r."""
        return len(self.Q)

    @property
    def turn(self) -> Tensor:
        """Q − I, (r, r)."""
        return self.Q - torch.eye(self.rank, dtype=self.Q.dtype, device=self.Q.device)

    @property
    def inverse(self) -> Compact:
        """Rᵀ, which is R⁻¹."""
        return Compact(self.U, self.Q.T)

    def left(self, W: Tensor) -> Tensor:
        """R W (n, m) of W (n, m)."""
        return W + self.U @ (self.turn @ (self.U.T @ W))

    def right(self, W: Tensor) -> Tensor:
        """W R (m, n) of W (m, n)."""
        return W + ((W @ self.U) @ self.turn) @ self.U.T

    def dense(self) -> Tensor:
        """R (n, n)."""
        return self.left(torch.eye(len(self.U), dtype=self.U.dtype, device=self.U.device))


def as_compact(R: Tensor) -> Compact:
    """A dense rotation R (n, n) as a compact one of full rank."""
    return Compact(torch.eye(len(R), dtype=R.dtype, device=R.device), R)


def product(A: Compact, B: Compact) -> Compact:
    """A B, exactly (up to rounding): it turns the span of both, of rank at most the sum of theirs."""
    U = widened(A.U, B.U)
    return Compact(U, U.T @ A.left(B.left(U)))


def times(A: Tensor | Compact, B: Tensor | Compact) -> Tensor | Compact:
    """A B in the smaller form: compact where both are and their product is of low rank, else dense."""
    if isinstance(A, Compact) and isinstance(B, Compact):
        whole = product(A, B)
        return whole if whole.rank * (len(whole.U) + whole.rank) < len(whole.U) ** 2 else whole.dense()
    if isinstance(A, Compact):
        assert isinstance(B, Tensor)
        return A.left(B)
    return B.right(A) if isinstance(B, Compact) else A @ B


def apart(A: Tensor | Compact | None, B: Tensor | Compact | None) -> float:
    """‖A − B‖_F / √n of two rotations of size n, None being the identity; no (n, n) matrix where both are compact."""
    if isinstance(A, Compact) and isinstance(B, Compact):
        U = widened(A.U, B.U)  # nothing happens outside the span of both
        return float(torch.linalg.norm(U.T @ (A.left(U) - B.left(U)))) / len(U) ** 0.5
    if A is not None and B is not None:
        a, b = (X.dense() if isinstance(X, Compact) else X for X in (A, B))
        return float(torch.linalg.norm(a - b)) / len(a) ** 0.5
    R = B if A is None else A
    if isinstance(R, Compact):
        return float(torch.linalg.norm(R.turn)) / len(R.U) ** 0.5
    return 0.0 if R is None else float(torch.linalg.norm(R - torch.eye(len(R)).to(R))) / len(R) ** 0.5


def commutator(A: Tensor | Compact, B: Tensor | Compact) -> float:
    """‖A B − B A‖_F / √n of two rotations of size n: 0 where their order does not matter."""
    if isinstance(A, Compact) and isinstance(B, Compact):
        U = widened(A.U, B.U)  # nothing happens outside the span of both
        a, b = (U.T @ R.left(U) for R in (A, B))
        return float(torch.linalg.norm(a @ b - b @ a)) / len(U) ** 0.5
    ab, ba = (X.dense() if isinstance(X, Compact) else X for X in (times(A, B), times(B, A)))
    return float(torch.linalg.norm(ab - ba)) / len(ab) ** 0.5


def conjugated(R: Compact, by: Compact) -> Compact:
    """S R Sᵀ for S = ``by``: the same turn in the turned span."""
    return Compact(by.left(R.U), R.Q)


def widened(U: Tensor, *more: Tensor, tolerance: float = 1e-7) -> Tensor:
    """Orthonormal columns that begin with U (n, r) and span those of ``more`` too; what lies in the span is dropped.

    Args:
        tolerance: a column of which less than this share sticks out of the span is taken to lie in it.
    """
    new = torch.cat([m / m.norm(dim=0).clamp_min(torch.finfo(m.dtype).tiny) for m in more], 1)
    for _ in range(2):  # once is not enough in floating point
        new = new - U @ (U.T @ new)
    left, strength, _ = torch.linalg.svd(new, full_matrices=False)
    new = left[:, strength > tolerance]
    return torch.cat([U, torch.linalg.qr(new - U @ (U.T @ new))[0]], 1)[:, : len(U)]


def compressed(R: Compact, M: Tensor, tolerance: float) -> tuple[Compact, float]:
    """The compact rotation of least rank found whose effect is that of R to ``tolerance``, and what is left over.

    The effect is measured where it matters: ‖(R_c − R) M½‖ / ‖(R − I) M½‖. Of R − I the strongest directions there,
    what they write (left) and what they read (right), span U; Q is the rotation in that span nearest to R.

    Args:
        M: (n, n) second moment of what R multiplies, such as W C Wᵀ, positive semidefinite.
    """
    G = R.U.T @ M @ R.U  # (r, r): all happens in the span of U
    D = R.turn
    strength, P = torch.linalg.eigh(D @ G @ D.T)
    P, whole = P.flip(1), float(strength.clamp_min(0).sum())
    if whole <= 1e-24 * float(G.trace()):  # nothing but rounding
        return Compact(R.U[:, :1], torch.ones_like(R.Q[:1, :1])), 0.0

    def of_rank(k: int) -> tuple[Compact, float]:
        U = widened(P[:, :0], P[:, :k], D.T @ P[:, :k])
        Q = nearest_rotation(U.T @ (D @ G @ U + U @ (U.T @ G @ U)))
        c = Compact(U, Q)
        E = U @ c.turn @ U.T - D
        return Compact(R.U @ U, Q), float(((E @ G) * E).sum().clamp_min(0) / whole) ** 0.5

    low, high = 0, 1
    while high < R.rank and of_rank(high)[1] > tolerance:
        low, high = high, min(2 * high, R.rank)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of_rank(middle)[1] > tolerance else (low, middle)
    return of_rank(high)
