"""Rotations of two small subspaces that bring L W R nearest to a target: Gauss-Newton on the two rotation groups.

Everything of size d or p has been turned into (r, s) products before, so that hundreds of steps cost milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mosectl.linalg.rotation import nearest_rotation

STEPS = 100  # of Gauss-Newton, at most
INNER = 60  # of conjugate gradients in each
ENOUGH = 1e-3  # relative gain of a step; two in a row below it end the search
DAMPING = 1.0  # of the first step, as a share of the metric that preconditions it: the problem is not convex
GIVEN_UP = 1e6
LARGEST = 1.0  # radians by which a step turns anything, at most: beyond, the linear problem says nothing


def coordinates(basis: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """X (k, n) and Y (k, n) for n columns of this Gram matrix (n, n): their coordinates in an orthonormal basis of their
    span, and what turns products with the columns into products with that basis. Dependent columns are no harm.

    Args:
        basis: (m, n) the columns themselves, for their device and type. gram: (n, n) their products.
    """
    length = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(gram / length[:, None] / length)
    kept = values > 1e-13 * values[-1]
    root = values[kept].sqrt()
    return (vectors[:, kept] * root).T * length, (vectors[:, kept] / root).T / length


@dataclass(frozen=True)
class SmallTurns:
    """‖u X a + b Y v + u X c Y v − D‖² of X = Q − I and Y = P − I for rotations Q (r, r) and P (s, s).

    u X a is what L does to W, b Y v what R does, in orthonormal coordinates of k left and l right directions.
    """

    u: Tensor  # (k, r) orthonormal columns
    b: Tensor  # (k, s)
    a: Tensor  # (r, l)
    v: Tensor  # (s, l)
    c: Tensor  # (r, s)
    D: Tensor  # (k, l) what is wanted

    def at(self, Q: Tensor, P: Tensor) -> _Place:
        """Residual and derivatives at Q and P."""
        X, Y = (R - torch.eye(len(R)).to(R) for R in (Q, P))
        moved = self.b + self.u @ X @ self.c
        return _Place(
            self, Q, P, self.u @ X @ self.a + moved @ Y @ self.v - self.D, Q @ (self.a + self.c @ Y @ self.v), moved @ P
        )

    def solve(self, Q: Tensor, P: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best rotations found from Q and P on, and the square that is left.

        Levenberg-Marquardt: each step solves the Gauss-Newton equations by conjugate gradients.
        """
        here, damping, slow = self.at(Q, P), DAMPING, 0
        for _ in range(STEPS):
            x, y, expected = here.step(damping)
            there = self.at(torch.matrix_exp(x) @ here.Q, here.P @ torch.matrix_exp(y))
            if not there.cost < here.cost:
                damping *= 8
                if damping > GIVEN_UP:
                    break
                continue
            gain = here.cost - there.cost
            agreed = gain / max(expected, torch.finfo(torch.float64).tiny)
            slow = slow + 1 if gain < ENOUGH * here.cost else 0
            here = there
            damping = max(1e-7, damping * (1 / 3 if agreed > 0.75 else 1 if agreed > 0.25 else 2))
            if slow == 2:
                break
        Q, P = (nearest_rotation(R) if len(R) else R for R in (here.Q, here.P))  # rounding adds up
        return Q, P, here.cost


@dataclass(frozen=True)
class _Place:
    """One pair of rotations: a step (x, y), both skew, leads to exp(x) Q and P exp(y)."""

    problem: SmallTurns
    Q: Tensor
    P: Tensor
    residual: Tensor  # (k, l)
    a: Tensor  # (r, l) a as R leaves it and L has turned it
    b: Tensor  # (k, s)

    @cached_property
    def cost(self) -> float:
        return float(self.residual.square().sum())

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the residual (k, l), to first order."""
        return self.problem.u @ x @ self.a + self.b @ y @ self.problem.v

    def gradient(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Half the derivatives of the square by x (r, r) and y (s, s), skew."""
        return _skew(self.problem.u.T @ residual @ self.a.T), _skew(self.b.T @ residual @ self.problem.v.T)

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bases m (r, r) and S (s, s) in which the Gauss-Newton equations of x = m X mᵀ alone and of y = S Y Sᵀ alone are
        products entry by entry, with ``left`` (r, r) and ``right`` (s, s): left, m, right, S.
        """
        left, m = torch.linalg.eigh(self.a @ self.a.T)
        v = self.problem.v
        VV = v @ v.T
        VV.diagonal().add_(1e-14 * VV.diagonal().mean())
        inverse = torch.linalg.inv(torch.linalg.cholesky(VV))
        right, q = torch.linalg.eigh(inverse @ (self.b.T @ self.b) @ inverse.T)
        return _sums(left), m, _sums(right), inverse.T @ q

    def step(self, damping: float) -> tuple[Tensor, Tensor, float]:
        """x (r, r), y (s, s) and by how much the square should fall, to first order.

        By conjugate gradients in the bases of ``blocks``, whose preconditioner is a division: what an iteration takes is
        two products for what x and y do to one another.
        """
        left, m, right, S = self.blocks
        b = m.T @ (self.problem.u.T @ self.b) @ S  # (r, s)
        v = S.T @ (self.problem.v @ self.a.T) @ m  # (s, r)
        own = [(1 + damping) * left, (1 + damping) * right]

        def product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return own[0] * x + _skew(b @ y @ v), own[1] * y + _skew(b.T @ x @ v.T)

        gx, gy = self.gradient(self.residual)
        rest = [-m.T @ gx @ m, -S.T @ gy @ S]

        def quotient(rest: list[Tensor]) -> list[Tensor]:
            return [r / o for r, o in zip(rest, own, strict=True)]

        found = [torch.zeros_like(g) for g in rest]
        way = quotient(rest)
        size = first = _dot(rest, way)
        for _ in range(INNER):
            if not size > 1e-4 * first:
                break
            turned = product(*way)
            length = size / _dot(way, turned)
            found = [f + length * w for f, w in zip(found, way, strict=True)]
            rest = [r - length * t for r, t in zip(rest, turned, strict=True)]
            next_way = quotient(rest)
            before, size = size, _dot(rest, next_way)
            way = [n + size / before * w for n, w in zip(next_way, way, strict=True)]
        x, y = (_within(_skew(T @ f @ T.T)) for T, f in zip((m, S), found, strict=True))
        return x, y, self.cost - float((self.residual + self.change(x, y)).square().sum())


def _within(x: Tensor) -> Tensor:
    """x (n, n), shortened where it turns something too far."""
    return x * (LARGEST / torch.linalg.matrix_norm(x, 2).clamp_min(LARGEST)) if len(x) else x


def _skew(X: Tensor) -> Tensor:
    return (X - X.T) / 2


def _sums(values: Tensor) -> Tensor:
    """Half the sum of each pair of eigenvalues, none of them nothing."""
    values = values.clamp_min(1e-14 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)) if len(values) else values
    return (values[:, None] + values) / 2


def _dot(a: list[Tensor] | tuple[Tensor, ...], b: list[Tensor] | tuple[Tensor, ...]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
