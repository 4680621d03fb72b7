"""What a patch does to one weight W (d, p): multiply it by rotations, or add a low-rank matrix to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mosectl.errors import BaseMismatch, PatchError
from mosectl.linalg.rotation import Compact, left_factor, product_svd, right_factor, times, two_sided_factors

SIDES = {"output": ("R",), "input": ("R_in",), "both": ("R", "R_in"), "additive": ("A", "B")}
# Rows or columns of W worked on at once: a weight of 8 B models takes 0.5 GB as float64, one copy is enough.
BLOCK = 1024
COMPACT = {"R": ("U", "Q"), "R_in": ("U_in", "Q_in")}  # the other form of a rotation


@dataclass(frozen=True)
class Change:
    """W' = L W R, a missing factor being the identity, or W' = W + B A; the factors by their names in a patch file.

    There L (d, d) is called "R", and R (p, p) "R_in". Both are rotations, dense or compact: U (n, r) and Q (r, r) stand for
    I + U (Q − I) Uᵀ. A (r, p) and B (d, r) are no rotations. All are float32 in a patch.
    """

    factors: Mapping[str, Tensor]

    def side(self) -> str | None:
        """The side (a key of SIDES) these factors are for; None if they make no change."""
        return side_of(self.factors)

    def rotation(self, name: str) -> Tensor | Compact | None:
        """The rotation "R" (L) or "R_in" (R), float64, in the form it is held in; None where there is none."""
        if name in self.factors:
            return self.factors[name].double()
        U, Q = COMPACT[name]
        return Compact(self.factors[U].double(), self.factors[Q].double()) if U in self.factors else None

    def widths(self) -> dict[str, int]:
        """d and p of the weights that it fits, as far as the factors tell."""
        found = {"d": ("R", "U", "B"), "p": ("R_in", "U_in")}
        out = {name: len(self.factors[k]) for name, kinds in found.items() for k in kinds if k in self.factors}
        return {**out, "p": self.factors["A"].shape[1]} if "A" in self.factors else out

    def apply(self, W: Tensor) -> Tensor:
        """The changed W (d, p), float64 on the factors' device.

        Raises:
            BaseMismatch: the factors are for weights of another shape.
        """
        if not self.widths().items() <= {"d": W.shape[0], "p": W.shape[1]}.items():
            wanted = ", ".join(f"{name} = {n}" for name, n in self.widths().items())
            what = f"the change is for weights with {wanted}, here is one of shape {list(W.shape)}"
            raise BaseMismatch(what, fix="give the model that the patch was made for")
        W = W.detach().to(next(iter(self.factors.values())).device, torch.float64, copy=True)
        if "A" in self.factors:
            A, B = self.factors["A"].double(), self.factors["B"].double()
            for part, a in zip(W.split(BLOCK, 1), A.split(BLOCK, 1), strict=True):
                part += B @ a
            return W
        L, R = self.rotation("R"), self.rotation("R_in")
        for part in W.split(BLOCK, 1) if L is not None else ():
            part.copy_(L.left(part) if isinstance(L, Compact) else L @ part)
        for part in W.split(BLOCK) if R is not None else ():
            part.copy_(R.right(part) if isinstance(R, Compact) else part @ R)
        return W

    def undo(self, W: Tensor) -> Tensor:
        """The inverse of :meth:`apply` up to rounding: Lᵀ W Rᵀ, or W − B A."""
        f = self.factors
        if "A" in f:
            return Change({"A": f["A"], "B": -f["B"]}).apply(W)
        return Change({name: factor if name in ("U", "U_in") else factor.T for name, factor in f.items()}).apply(W)

    def dense(self) -> Change:
        """The same with dense rotations, float32."""
        rotations = {name: self.rotation(name) for name in COMPACT}
        full = {n: R.dense() if isinstance(R, Compact) else R for n, R in rotations.items() if R is not None}
        return Change({n: R.float() for n, R in full.items()}) if full else self

    @property
    def nbytes(self) -> int:
        """Bytes that all factors take."""
        return sum(factor.nbytes for factor in self.factors.values())


def side_of(factors: Iterable[str]) -> str | None:
    """The side that factors of these names are for; None if they make no change."""
    names = set(factors)
    for dense, pair in COMPACT.items():
        if names >= set(pair) and dense not in names:
            names = names - set(pair) | {dense}
    return next((side for side, wanted in SIDES.items() if names == set(wanted)), None)


def changed(changes: Sequence[Change], W: Tensor) -> Tensor:
    """W (d, p) under ``changes`` in their order: computed in float64 and rounded once, in W's dtype on W's device.

    Experts in one tensor (experts, d, p) are changed one by one.
    """
    if W.dim() == 3:
        return torch.stack([changed(changes, w) for w in W])
    return reduce(lambda x, change: change.apply(x), changes, W).to(W.device, W.dtype)


def combined(changes: Sequence[Change]) -> Change:
    """One change that does what ``changes`` do in their order; compact where all are and where that is smaller.

    Raises:
        PatchError: rotations and additions mixed; R (W + B A) is neither.
    """
    kinds = {"A" in c.factors for c in changes}
    if len(kinds) > 1:
        fix = "apply them one after the other instead"
        raise PatchError("rotations and additive changes cannot become one change", fix=fix)
    if kinds == {True}:
        B = torch.cat([c.factors["B"].double() for c in changes], 1)
        A = torch.cat([c.factors["A"].double() for c in changes])
        B, A = _balanced(*product_svd(B, A))
        return Change({"A": A.float().contiguous(), "B": B.float().contiguous()})
    left = [R for c in changes if (R := c.rotation("R")) is not None]
    right = [R for c in changes if (R := c.rotation("R_in")) is not None]
    wholes = (
        reduce(times, rotations) if rotations else None for rotations in (left[::-1], right)
    )  # … R₂ R₁ W R₁' R₂' …
    return of_rotations(*wholes)


def of_rotations(left: Tensor | Compact | None, right: Tensor | Compact | None) -> Change:
    """L and R, each in the form it has, as a patch holds them; None: there is none."""
    factors: dict[str, Tensor] = {}
    for name, whole in (("R", left), ("R_in", right)):
        if isinstance(whole, Compact):
            factors |= dict(zip(COMPACT[name], (whole.U, whole.Q), strict=True))
        elif whole is not None:
            factors[name] = whole
    return Change({name: f.float().cpu().contiguous() for name, f in factors.items()})


def restored(changes: Sequence[Change], W: Tensor) -> Tensor:
    """W (d, p) or (experts, d, p) with ``changes``, given in the order they were applied, undone: rounded once."""
    if W.dim() == 3:
        return torch.stack([restored(changes, w) for w in W])
    return reduce(lambda x, change: change.undo(x), reversed(changes), W).to(W.device, W.dtype)


def change_between(W0: Tensor, W: Tensor, side: str) -> Change:
    """The change that leads from W0 to W, both (d, p) float64, with float32 factors for ``side`` (a key of SIDES).

    For the orthogonal sides W must have W0's singular values (and, on one side, its other singular vectors).
    """
    if side == "additive":
        B, A = _low_rank(W - W0)
        factors = {"A": A, "B": B}
    elif side == "both":
        R, R_in = two_sided_factors(W0, W)
        factors = {"R": R, "R_in": R_in}
    elif side == "output":
        factors = {"R": left_factor(W0, W)}
    else:
        factors = {"R_in": right_factor(W0, W)}
    return Change({name: factor.float().cpu().contiguous() for name, factor in factors.items()})


def _low_rank(D: Tensor) -> tuple[Tensor, Tensor]:
    """B (d, r), A (r, p) with B A = D to float32's precision, the singular values shared between the two."""
    return _balanced(*torch.linalg.svd(D, full_matrices=False))


def _balanced(U: Tensor, S: Tensor, Zh: Tensor) -> tuple[Tensor, Tensor]:
    """B (d, r), A (r, p) with B A = U diag(S) Zᵀ without what float32 cannot tell from nothing."""
    r = max(1, int((torch.finfo(torch.float32).eps * S[0] < S).sum()))
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Zh[:r]
