"""HORSE's update taken to the nearest weight of the layer's own singular values (ours): a rotation on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.editing.methods import register
from mosectl.editing.methods.horse import ONCE, horse
from mosectl.linalg.rotation import thin_svd
from mosectl.model.architecture import Architecture, Projection


@register(
    "horse-isospectral",
    side="both",
    source="mosectl; arXiv 2601.11441",
    kind="fit",
    trained="horse",
    settings=ONCE,
    strength=1.0,
)
def horse_isospectral(
    model: nn.Module,
    arch: Architecture,
    projections: Sequence[Projection],
    contexts: Any,
    W: Mapping[str, Tensor],
    options: Mapping[str, float],
    editor: Any,
) -> dict[str, Tensor]:
    """U' Σ Z'ᵀ by module path, where W + ΔW = U' Σ' Z'ᵀ and Σ are W's own: the nearest in the Frobenius norm (Mirsky 1960).

    Arguments and options as :func:`mosectl.editing.methods.horse.horse`.
    """
    additive = horse(model, arch, projections, contexts, W, options, editor)
    out = {}
    for name, X in additive.items():
        U, _, Zh = thin_svd(X)
        out[name] = (U * torch.linalg.svdvals(W[name])) @ Zh
    return out
