"""ROME: a rank-one update that makes one key give exactly its value (arXiv 2202.05262, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.methods.base import FFN, PUBLISHED, SPREAD, LayerProblem, Option, Published, Solver
from mosectl.editing.methods.memit import right_divide

LAYERS = {"gpt2": (17, 17, 48), "gptj": (5, 5, 28), "": (5, 5, 32)}


class Rome(Solver):
    """W' = W + (v − W k)(C⁻¹k)ᵀ / kᵀC⁻¹k, one fact after the other: a later one of a batch may undo an earlier one.

    Where k is a mean over contexts, kᵀC⁻¹k₀ divides instead, so that the bare prompt's k₀ gives the value exactly
    (github.com/kmeng01/rome, compute_v).
    """

    name, side, source, placement = "rome", "additive", "arXiv 2202.05262", SPREAD
    settings = {**PUBLISHED, "prefixes": 20}
    published = Published(layers=LAYERS, lengths=(5, 10), bare=0, site=FFN, batch=1)
    options = {"covariance": Option(1.0, "1: along C⁻¹k, as in the paper; 0: along k, as EasyEdit's settings have it")}

    def update(self, problem: LayerProblem) -> Tensor:
        W, K = problem.W, problem.K
        directions = right_divide(K.T, problem.kept()) if problem.options["covariance"] else K.T  # rows (C⁻¹ k)ᵀ
        bare = K if problem.bare is None else problem.bare
        for k, v, c, at in zip(K.T, problem.V.T, directions, bare.T, strict=True):
            W = W + torch.outer(v - W @ k, c) / (c @ at)
        return W
