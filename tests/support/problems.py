"""One layer's part of an edit, of random numbers in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods import method
from mosectl.editing.methods.base import LayerProblem

D, P = 10, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    name: str = "mose", m: int = 4, samples: int = 300, seed: int = 0, d: int = D, p: int = P, **options: float
) -> LayerProblem:
    W, X = random(d, p, seed=seed) / p**0.5, random(p, samples, seed=seed + 100)
    K = random(p, m, seed=seed + 200)
    return LayerProblem(
        W=W, W0=W, C=X @ X.T / samples, P=torch.zeros(p, p).double(), Q=torch.zeros(d, p).double(), K=K,
        V=W @ K + 0.5 * random(d, m, seed=seed + 300), weight=torch.ones(m, dtype=torch.float64),
        options={**method(name).defaults, **options},
    )  # fmt: skip
