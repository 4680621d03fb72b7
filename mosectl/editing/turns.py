"""One layer's rotations over a run: those of all batches so far, those of the present one, and what its solves share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mosectl.editing.low_rank import Gram
from mosectl.editing.methods.base import Columns, Still, Turner, TurnProblem
from mosectl.linalg.metric import root_of
from mosectl.linalg.rotation import Compact, times

Rotation = Tensor | Compact
Pair = tuple[Compact, Compact]
Sums = tuple[Tensor, Tensor]
SIDES = ("left", "right")


class LayerTurns:
    """W = L W₀ R of one layer, L and R those of all batches that were kept."""

    def __init__(self, name: str, W0: Tensor) -> None:
        self.name, self.W0 = name, W0  # (d, p) float64
        self.left: Rotation | None = None
        self.right: Rotation | None = None
        self.begun = W0  # (d, p) as the present batch found it
        self.pair: Pair | None = None  # of the present batch
        self.root: Tensor | None = None  # (p, p) factor of C, raised: what every batch needs and none changes
        self.gram: Gram | None = None  # W₀ W₀ᵀ
        self.still: Still | None = None  # of the present batch, from its first solve on

    def solve(
        self, solver: Turner, C: dict[str, Tensor], columns: Columns, earlier: Sums | None, keep: float,
        options: Mapping[str, float],
    ) -> Tensor:  # fmt: skip
        """The weight (d, p) that the present batch's facts ask for, sought anew from where the batch began.

        Args:
            C: (p, p) second moments by module path: ours is taken out, its factor is kept instead.
            earlier: of earlier edits Σ w k kᵀ (p, p) and Σ w v kᵀ (d, p), v being what the layer wrote when they were made.
        """
        if self.root is None or self.gram is None:
            self.root = root_of(C.pop(self.name).to(self.W0.device), options["damping"])
            self.gram = Gram.of(self.W0)
        self.still = self.still or self._still(self.root, options["preserve"], earlier)
        gram = Gram(self.gram.root, self.left)
        self.pair = solver.turns(TurnProblem(self.begun, self.still, gram, columns, options, self.name, keep))
        return self.turned()

    def _still(self, root: Tensor, preserve: float, earlier: Sums | None) -> Still:
        """Ordinary text λ‖(X − W₀)C½‖² and earlier edits Σ w‖X k − v‖² as one square, and factorised once a batch: what a
        round takes does not grow with the number of edits.
        """
        if earlier is None:
            S, scale, T = root, preserve, self.W0
        else:
            P, Q = (x.to(self.W0.device) for x in earlier)
            A = (root @ root.T).mul_(preserve).add_(P.to(root))
            S, scale = torch.linalg.cholesky(A), 1.0
            T = self.W0 + torch.cholesky_solve((Q - self.W0 @ P).T.to(S), S).T.to(self.W0)
        if T is self.begun:
            return Still(S, scale, T)
        missing = T - self.begun
        weighed = (S @ (S.T @ missing.T.to(S))).to(missing).mul_(scale)
        return Still(S, scale, T, missing, weighed)

    def turned(self) -> Tensor:
        """W (d, p) with the present batch's rotations."""
        if self.pair is None:
            return self.begun
        L, R = self.pair
        return R.right(L.left(self.begun))

    def keep(self) -> Tensor:
        """The present batch's rotations stay; returns W (d, p), computed from W₀ as a patch does."""
        if self.pair:
            L, R = self.pair
            self.left = L if self.left is None else times(L, self.left)
            self.right = R if self.right is None else times(self.right, R)
        return self.take(self.left, self.right)

    def take(self, left: Rotation | None, right: Rotation | None) -> Tensor:
        """These are the rotations of all batches; returns W (d, p)."""
        self.left, self.right, self.pair, self.still = left, right, None, None
        W = self.W0
        if left is not None:
            W = left.left(W) if isinstance(left, Compact) else left @ W
        if right is not None:
            W = right.right(W) if isinstance(right, Compact) else W @ right
        self.begun = W
        return W

    def factors(self, side: str) -> tuple[Rotation | None, Rotation | None]:
        """Of the whole run, for ``side``: on the output side alone W₀ is the identity, and both rotations are one."""
        left = self.left if self.left is not None else _nothing(self.W0)
        right = self.right if self.right is not None else _nothing(self.W0.T)
        if side == "both":
            return left, right
        return times(left, right), None

    def tensors(self) -> dict[str, Tensor]:
        """Of the whole run, float64, by names that :func:`from_tensors` knows."""
        out: dict[str, Tensor] = {}
        for name, R in zip(SIDES, (self.left, self.right), strict=True):
            if R is not None:
                parts = {"U": R.U, "Q": R.Q} if isinstance(R, Compact) else {"R": R}
                out |= {f"{name}.{part}": x for part, x in parts.items()}
        return out


def from_tensors(tensors: Mapping[str, Tensor]) -> tuple[Rotation | None, Rotation | None]:
    """The rotations of :meth:`LayerTurns.tensors`."""
    found: list[Rotation | None] = []
    for name in SIDES:
        if f"{name}.R" in tensors:
            found.append(tensors[f"{name}.R"])
        elif f"{name}.U" in tensors:
            found.append(Compact(tensors[f"{name}.U"], tensors[f"{name}.Q"]))
        else:
            found.append(None)
    return found[0], found[1]


def _nothing(W: Tensor) -> Compact:
    """The identity that turns the rows of W (n, m), in compact form."""
    return Compact(torch.eye(len(W), 1).to(W), torch.ones(1, 1).to(W))
