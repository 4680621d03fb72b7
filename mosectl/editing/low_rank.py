"""The compact form of a change: rotations of low rank that do to W what the full ones do, to a stated tolerance.

On one side the full rotation is cut down (rotation.compressed). On two sides that fails: the pair (L, R) with L W R = W' is
far from unique, and the one that keeps W's spectrum exactly turns everything a little on either side. So a compact pair
is fitted to W' itself, in the metric of the keys: min ‖(L W R − W') A½‖ over rotations of two small subspaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.linalg.rotation import Compact, as_compact, compressed, left_factor, widened
from mosectl.patch.change import Change

STEPS = 100  # of L-BFGS in each stage
FIRST = 4  # directions of W' − W that a stage adds at least


def compact_change(W0: Tensor, W: Tensor, A: Tensor, side: str, tolerance: float) -> tuple[Change, float] | None:
    """Low-rank rotations that lead from W0 to W, both (d, p) float64, and what is left over.

    None where they would take as many numbers as dense ones.

    Args:
        A: (p, p) second moment of the keys that count, positive definite.
        side: "output", "input" or "both".
        tolerance: on ‖(W_c − W) A½‖ / ‖(W − W0) A½‖.
    """
    if side == "output":
        c, error = compressed(as_compact(left_factor(W0, W)), W0 @ A @ W0.T, tolerance)
        found: tuple[Compact | None, Compact | None, float] = c, None, error
    else:
        found = _fitted(W0, W, A, side == "both", tolerance)
    left, right, error = found
    held = [c for c in (left, right) if c]
    if error > tolerance or sum(c.rank * (len(c.U) + c.rank) for c in held) >= sum(len(c.U) ** 2 for c in held):
        return None
    factors = ({"U": left.U, "Q": left.Q} if left else {}) | ({"U_in": right.U, "Q_in": right.Q} if right else {})
    return Change({name: f.float().cpu().contiguous() for name, f in factors.items()}), error


def _fitted(
    W0: Tensor, W: Tensor, A: Tensor, both: bool, tolerance: float
) -> tuple[Compact | None, Compact | None, float]:
    """L and R of growing rank with L W0 R ≈ W; stops at the tolerance, or where the pair is no smaller than dense ones."""
    d, p = W0.shape
    gram = torch.linalg.cholesky(W0 @ W0.T + 1e-12 * W0.square().sum() / d * torch.eye(d).to(W0))
    L, R = Compact(W0[:, :0], W0[:0, :0]), Compact(W0.T[:, :0], W0[:0, :0])
    E = W - W0
    whole = float(((E @ A) * E).sum())
    error = 1.0 if whole > 0 else 0.0
    while error > tolerance and (2 * L.rank < d if both else R.rank < p):
        strength, written = torch.linalg.eigh(E @ A @ E.T)  # ascending
        needed = int(
            (strength.clamp_min(0).cumsum(0) > tolerance**2 * whole).sum()
        )  # the others leave less than may be
        k = max(FIRST, min(needed, R.rank // 4) if R.rank else needed)
        strong = written[:, -k:]  # (d, k) what E writes for typical keys
        read = E.T @ strong  # (p, k) the keys it writes that for
        writing = W0.T @ torch.cholesky_solve(strong, gram)  # (p, k) keys that W0 writes it for
        U = widened(L.U, strong, W0 @ read) if both else L.U
        V = widened(R.U, read, writing)
        L, R = _rotations(W0, W, A, U, V, L, R, whole)
        E = W - R.right(L.left(W0))
        error = float(((E @ A) * E).sum() / whole) ** 0.5
    return (L if both else None), R, error


def _rotations(
    W0: Tensor, W: Tensor, A: Tensor, U: Tensor, V: Tensor, L: Compact, R: Compact, whole: float
) -> tuple[Compact, Compact]:
    """Rotations Q of span(U) and P of span(V) that minimise ‖(L W0 R − W) A½‖², by L-BFGS from L and R on.

    With X = Q − I and Y = P − I the residual is D − U X a − (b + U X c) Y Vᵀ, D = W − W0, a = UᵀW0, b = W0 V, c = UᵀW0 V,
    and all of its square comes from (r, s) products that are made once.
    """
    D, a, b = W - W0, U.T @ W0, W0 @ V
    AV, Aa = A @ V, A @ a.T
    DAV, c = D @ AV, a @ V
    DAa, bDAV, UDAV = U.T @ (D @ Aa), b.T @ DAV, U.T @ DAV
    aAa, aAV, VAV, bb = a @ Aa, a @ AV, V.T @ AV, b.T @ b

    def objective(Q: Tensor, P: Tensor) -> Tensor:
        """The square less ‖D A½‖²."""
        X, Y = Q - torch.eye(len(Q)).to(Q), P - torch.eye(len(P)).to(P)
        gained = (DAa * X).sum() + (Y * (bDAV + (X @ c).T @ UDAV)).sum()
        squares = ((X @ aAa) * X).sum() + ((bb @ Y @ VAV) * Y).sum()
        return squares - 2 * gained + 2 * ((X @ aAV @ Y.T) * (Q @ c)).sum()

    Q0, P0 = _embedded(L.Q, U.shape[1]), _embedded(R.Q, V.shape[1])
    x, y = torch.zeros_like(Q0, requires_grad=True), torch.zeros_like(P0, requires_grad=True)

    def rotations() -> tuple[Tensor, Tensor]:
        return Q0 @ torch.matrix_exp(x - x.T), P0 @ torch.matrix_exp(y - y.T)

    search = torch.optim.LBFGS([x, y], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def step() -> float:
        search.zero_grad()
        loss = objective(*rotations()) / whole
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        search.step(step)
    with torch.no_grad():
        Q, P = rotations()
    return Compact(U, Q), Compact(V, P)


def _embedded(Q: Tensor, n: int) -> Tensor:
    """Q (r, r) in the corner of an identity (n, n)."""
    return torch.block_diag(Q, torch.eye(n - len(Q)).to(Q))
