"""OFT: what the official MOSE release does instead of its closed form: rotate the input side, trained by descent.

A block-diagonal rotation of W's input, each block a Cayley transform (Qiu et al. 2023, arXiv 2306.07280, eqs. 2-3),
by Adam on the cross-entropy of the new objects. It needs no keys, targets or statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.editing.methods.base import ModelProblem, Option, Trainer
from mosectl.model.forward import frozen, hooked
from mosectl.model.losses import token_nll
from mosectl.model.partial_forward import Suffix


def cayley(raw: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ with A = raw − rawᵀ: a rotation (n, n) for any square ``raw``."""
    A = raw - raw.T
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye + A, eye - A, left=False)


class Oft(Trainer):
    """W' = W R by module path, R block-diagonal, for one batch of facts."""

    name, side, source = "oft", "input", "arXiv 2306.07280"
    settings = {"rounds": 1, "previous_edit_weight": 0.0}
    remedy = "more --set steps_oft=…, a larger --set rate=… or other --layers"
    options = {
        "blocks": Option(4.0, "blocks of the rotation", whole=True),
        "steps_oft": Option(25.0, "steps of Adam", whole=True),
        "rate": Option(5e-4, "Adam's learning rate"),
    }

    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        model, projections, contexts, W = problem.model, problem.projections, problem.contexts, problem.W
        raw = {
            p.name: [
                torch.zeros(len(part), len(part), device=W[p.name].device, requires_grad=True)
                for part in torch.arange(p.p).tensor_split(int(problem.options["blocks"]))
            ]
            for p in projections
        }
        adam = torch.optim.Adam([x for blocks in raw.values() for x in blocks], lr=problem.options["rate"])
        rows, targets = contexts.edit_rows, contexts.targets[contexts.edit_rows]
        with frozen(model):
            suffix = Suffix(model, problem.arch, projections[0].layer, contexts.batch, below=contexts.below)
            for _ in range(int(problem.options["steps_oft"])):
                turns = {name: torch.block_diag(*map(cayley, blocks)) for name, blocks in raw.items()}
                handles = [
                    model.get_submodule(name).register_forward_pre_hook(_turn_input(R)) for name, R in turns.items()
                ]
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
