"""How much text the second moments need: how well they are known so far, and where reading will end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

SKETCH = 64  # directions in which the error is judged


class Work:
    """How many of the batches will be run, as far as one can tell, for a bar whose end and pace can be believed."""

    def __init__(self, batches: Sequence[tuple[int, int, list[list[int]]]], enough: float, share: float) -> None:
        self.enough, self.end = enough, len(batches)
        blocks = [block for _, block, _ in batches]
        self.ends = [i for i in range(1, len(blocks) + 1) if i == len(blocks) or blocks[i] > blocks[i - 1]]
        self.tokens = [0, *accumulate(sum(map(len, sequences)) for _, _, sequences in batches)]
        # Of a forward pass; a gradient takes three.
        each = (100 + (block == 0) * round(300 * share) for block in blocks)
        self.costs = [0, *accumulate(each)]

    def foresee(self, done: int, error: float) -> None:
        """The error of C falls with the root of the tokens read; whole blocks are read."""
        needed = self.tokens[done] * (error / self.enough) ** 2
        self.end = next((i for i in self.ends if i >= done and self.tokens[i] >= needed), self.ends[-1])

    def so_far(self, done: int) -> tuple[int, int]:
        """What the batches done have cost, of what all will that are run."""
        return self.costs[done], self.costs[self.end]


class Halves:
    """How well a layer's C is known, from two halves of the texts in a few random directions."""

    def __init__(self, total: Tensor) -> None:
        self.total = total  # (p, p) sum of k kᵀ over all texts, kept up to date by others
        rng = torch.Generator().manual_seed(0)
        self.directions = (torch.randn(len(total), SKETCH, generator=rng) / SKETCH**0.5).to(total)
        self.sums = total.new_zeros(2, SKETCH, SKETCH)
        self.tokens = [0, 0]

    def add(self, k: Tensor, second: Tensor) -> None:
        """k (tokens, p); second (tokens,) which of them belong to the second half."""
        seen = k.to(self.directions) @ self.directions
        for half in (0, 1):
            x = seen[(second == half).to(seen.device)]
            self.sums[half].addmm_(x.T, x)
            self.tokens[half] += len(x)

    def error(self) -> float:
        """‖C_A − C_B‖_F / 2‖C‖_F; infinite while a half is empty."""
        if not all(self.tokens):
            return math.inf
        a, b = (total / n for total, n in zip(self.sums, self.tokens, strict=True))
        whole = torch.linalg.norm(self.total) / sum(self.tokens)
        return float(torch.linalg.norm(a - b) / (2 * whole.clamp_min(torch.finfo(whole.dtype).tiny)))
