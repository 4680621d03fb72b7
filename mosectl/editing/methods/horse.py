"""HORSE: a trained network gives the values, the ridge solution the weight (arXiv 2601.11441; MALMEN, arXiv 2311.04661)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mosectl.editing.contexts import Contexts
from mosectl.editing.methods import register
from mosectl.hypernetwork.file import Editor
from mosectl.hypernetwork.network import Rows, keys_and_gradients
from mosectl.model.architecture import Architecture, Projection
from mosectl.model.memory import fitting, halving

# One pass, no care for earlier edits, no other wordings: as published.
ONCE = {"rounds": 1, "protect": 0.0, "prefixes": 0, "wordings": 0, "rehearse": 0.0}


@register("horse", side="additive", source="arXiv 2601.11441", kind="fit", trained="horse", settings=ONCE, strength=1.0)
def horse(
    model: nn.Module,
    arch: Architecture,
    projections: Sequence[Projection],
    contexts: Contexts,
    W: Mapping[str, Tensor],
    options: Mapping[str, float],
    editor: Editor,
) -> dict[str, Tensor]:
    """W' = W + ΔW by module path for one batch of facts, ΔWᵀ = (KᵀK + e^λ I)⁻¹ KᵀD.

    Facts stream through in parts that fit in memory: KᵀK (p, p) and KᵀD (p, d) are sums.

    Args:
        W: (d, p) float64 by module path, the weights as they are in the live model.
    Options: ``strength`` scales D.
    """
    rows = contexts.edit_rows
    own = Rows(contexts.batch.rows(rows), contexts.positions[rows], contexts.targets[rows])
    net = editor.net.to(own.targets.device)
    like = [W[p.name] for p in projections]
    squares = [x.new_zeros(x.shape[1], x.shape[1]) for x in like]  # KᵀK
    products = [x.new_zeros(x.shape[1], x.shape[0]) for x in like]  # KᵀD

    def add(start: int, end: int) -> None:
        K, G, _ = keys_and_gradients(model, projections, own.part(start, end))
        with torch.no_grad():
            D = net(K, G)
        for i, (k, x) in enumerate(zip(K, D, strict=True)):
            k, x = k.to(like[i]), x.to(like[i])
            squares[i].addmm_(k.T, k)
            products[i].addmm_(k.T, x, alpha=options["strength"])

    size = fitting(model, arch, projections[0].layer, own.batch.input_ids.shape[1], own.targets.shape[1])
    for _ in halving(len(rows), size, add):
        pass
    out = {}
    for i, p in enumerate(projections):
        squares[i].diagonal().add_(net.ridge[i].exp().to(like[i]))
        out[p.name] = like[i] + torch.linalg.solve(squares[i], products[i]).T
    return out
