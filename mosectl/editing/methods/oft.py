"""OFT: what the official MOSE release does instead of its closed form: rotate the input side, trained by descent.

A block-diagonal rotation of W's input, each block a Cayley transform (Qiu et al. 2023, arXiv 2306.07280, eqs. 2-3),
by Adam on the cross-entropy of the new objects. It needs no keys, targets or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.editing.contexts import Contexts
from mosectl.editing.methods import register
from mosectl.model.architecture import Architecture, Projection
from mosectl.model.forward import frozen, hooked
from mosectl.model.losses import token_nll
from mosectl.model.partial_forward import Suffix


def cayley(raw: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ with A = raw − rawᵀ: a rotation (n, n) for any square ``raw``."""
    A = raw - raw.T
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye + A, eye - A, left=False)


@register(
    "oft",
    side="input",
    source="arXiv 2306.07280",
    kind="fit",
    settings={"rounds": 1, "protect": 0.0},
    blocks=4.0,
    steps_oft=25.0,
    rate=5e-4,
)
def oft(
    model: nn.Module,
    arch: Architecture,
    projections: Sequence[Projection],
    contexts: Contexts,
    W: Mapping[str, Tensor],
    options: Mapping[str, float],
) -> dict[str, Tensor]:
    """W' = W R_in by module path, R_in block-diagonal, for one batch of facts.

    Args:
        W: (d, p) float64 by module path, the weights as they are in the live model.
    Options: ``blocks`` on the diagonal; ``steps_oft`` of Adam; ``rate``, its learning rate.
    """
    raw = {
        p.name: [
            torch.zeros(len(part), len(part), device=W[p.name].device, requires_grad=True)
            for part in torch.arange(p.p).tensor_split(int(options["blocks"]))
        ]
        for p in projections
    }
    adam = torch.optim.Adam([x for blocks in raw.values() for x in blocks], lr=options["rate"])
    rows, targets = contexts.edit_rows, contexts.targets[contexts.edit_rows]
    with frozen(model):
        suffix = Suffix(model, arch, projections[0].layer, contexts.batch)
        for _ in range(int(options["steps_oft"])):
            turns = {name: torch.block_diag(*map(cayley, blocks)) for name, blocks in raw.items()}
            handles = [model.get_submodule(name).register_forward_pre_hook(_turn_input(R)) for name, R in turns.items()]
            with hooked(handles), torch.enable_grad():
                logp = suffix.logits(rows, contexts.positions[rows], targets >= 0).log_softmax(-1)
                loss = token_nll(logp, targets, targets >= 0).mean()
                adam.zero_grad(set_to_none=True)
                loss.backward()
            adam.step()
    with torch.no_grad():
        return {n: W[n] @ torch.block_diag(*(cayley(x.double()) for x in blocks)) for n, blocks in raw.items()}


def _turn_input(R: Tensor) -> Callable[..., Any]:
    """W (R k) for every key k, so that the live weight stays as it is."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k = args[0]
        return ((k.float() @ R.to(k.device).T).to(k.dtype), *args[1:])

    return hook
