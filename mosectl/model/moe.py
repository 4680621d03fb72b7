"""Mixtures of experts: one rotation turns the output of a whole block, every expert and the shared one alike.

A block writes y = Σ_e g_e W_e k_e (+ g_s W_s k_s) with gates g that the rotation does not touch, so R y is the output of
the same block with R W_e in place of every W_e. To the solvers a block is one projection whose W is the identity and
whose keys are y: while an edit is made, a "turn" R stands behind the block; a patch multiplies the experts by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mosectl.model.architecture import Architecture
from mosectl.model.forward import hooked

_TURN = "turn"


class Turn(nn.Module):
    """y ↦ R y, in float32 whatever the model's type."""

    bias = None

    def __init__(self, d: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d, device=device), requires_grad=False)  # (d, d)

    def forward(self, y: Tensor) -> Tensor:
        """R y for outputs y (…, d), in their own type."""
        return (y.float() @ self.weight.T).to(y.dtype)


@contextmanager
def turns(model: nn.Module, arch: Architecture) -> Iterator[Architecture]:
    """Inside the block every mixture of experts has a turn behind it, and the architecture's projections are the turns."""
    blocks = {p.name: model.get_submodule(p.name) for p in arch.projections if p.experts}
    handles = []
    for p in arch.projections:
        if p.experts:
            block = blocks[p.name]
            block.add_module(_TURN, Turn(p.d, next(block.parameters()).device))
            handles.append(block.register_forward_hook(lambda block, _, y: block.get_submodule(_TURN)(y)))
    renamed = [replace(p, name=f"{p.name}.{_TURN}") if p.experts else p for p in arch.projections]
    try:
        with hooked(handles):
            yield replace(arch, projections=tuple(renamed))
    finally:
        for block in blocks.values():
            delattr(block, _TURN)


def block_name(name: str) -> str:
    """The module that a patch names: a turn's block, any other module itself."""
    return name.removesuffix(f".{_TURN}")
