"""HORSE's update taken to the nearest weight of the layer's own singular values (ours): a rotation on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import ModelProblem
from mosectl.editing.methods.horse import Horse
from mosectl.linalg.rotation import thin_svd


class HorseIsospectral(Horse):
    """U' Σ Z'ᵀ by module path, where W + ΔW = U' Σ' Z'ᵀ Σ are W's own: nearest in the Frobenius norm (Mirsky 1960)."""

    name, side, source = "horse-isospectral", "both", "mosectl; arXiv 2601.11441"

    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        out = {}
        for name, X in super().fit(problem).items():
            U, _, Zh = thin_svd(X)
            out[name] = (U * torch.linalg.svdvals(problem.W[name])) @ Zh
        return out
