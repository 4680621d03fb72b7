"""What a patch does to one weight W (d, p): multiply it by rotations, or add a low-rank matrix to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mosectl.rotation import left_factor, right_factor, two_sided_factors

SIDES = {"output": ("R",), "input": ("R_in",), "both": ("R", "R_in"), "additive": ("A", "B")}


@dataclass(frozen=True)
class Change:
    """W' = R W R_in, a missing factor being the identity, or W' = W + B A; the factors by their names in a patch file.

    R (d, d) and R_in (p, p) are rotations, A (r, p) and B (d, r) are not; all float32 in a patch.
    """

    factors: Mapping[str, Tensor]

    def apply(self, W: Tensor) -> Tensor:
        """The changed W (d, p), float64 on the factors' device."""
        f = {name: factor.double() for name, factor in self.factors.items()}
        W = W.to(next(iter(f.values())))
        if "A" in f:
            return W + f["B"] @ f["A"]
        W = f["R"] @ W if "R" in f else W
        return W @ f["R_in"] if "R_in" in f else W

    def undo(self, W: Tensor) -> Tensor:
        """The inverse of :meth:`apply` up to rounding: Rᵀ W R_inᵀ, or W − B A."""
        f = self.factors
        if "A" in f:
            return Change({"A": f["A"], "B": -f["B"]}).apply(W)
        return Change({name: factor.T for name, factor in f.items()}).apply(W)

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors.values())


def changed(changes: Sequence[Change], W: Tensor) -> Tensor:
    """W (d, p) under ``changes`` in their order: computed in float64 and rounded once, in W's dtype on W's device."""
    return reduce(lambda x, change: change.apply(x), changes, W).to(W.device, W.dtype)


def restored(changes: Sequence[Change], W: Tensor) -> Tensor:
    """W (d, p) with ``changes``, given in the order they were applied, undone: rounded once."""
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
    U, S, Zh = torch.linalg.svd(D, full_matrices=False)
    r = max(1, int((torch.finfo(torch.float32).eps * S[0] < S).sum()))
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Zh[:r]
