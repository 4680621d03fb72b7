"""HORSE and MALMEN: a small network, trained on the model, says from one backward pass what a layer should write.

For each answer token the layer's key k and the gradient g of the loss by its output go through the network, which gives a
pseudo-key k̃ and a pseudo-gradient g̃; the output shall change there by D = −η ⟨k, k̃⟩ g̃, and the weight by the ridge
solution ΔWᵀ = (KᵀK + e^λ I)⁻¹ Kᵀ D over all tokens (MALMEN, arXiv 2311.04661, eqs. 5-8). HORSE (arXiv 2601.11441)
spreads the residual over the layers without repeating it: each layer's D loses its part along the layer below's g̃.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.model.edit_site import Projection
from mosectl.model.forward import by_row, finite, frozen, hooked, open_outputs
from mosectl.model.losses import token_nll
from mosectl.model.scoring import Rows, log_probabilities

METHODS = ("horse", "malmen")
START = 4.0  # share of its own length by which an untrained editor moves an output


class Hypernet(nn.Module):
    """(k, g) → D for some layers of one shape: residual blocks of low rank, shared but for each layer's scale and shift.

    Args:
        layers: L, how many. p, d: sizes of a key and of an output. rank: of a block. spread: HORSE's, else MALMEN.
    """

    def __init__(self, layers: int, p: int, d: int, rank: int = 128, blocks: int = 2, spread: bool = True) -> None:
        super().__init__()
        self.p, self.d, self.spread = p, d, spread
        size = p + d
        self.down = nn.Parameter(torch.randn(blocks, size, rank) / size**0.5)
        self.up = nn.Parameter(torch.zeros(blocks, rank, size))
        self.bias = nn.Parameter(torch.zeros(blocks, size))
        self.scale = nn.Parameter(torch.ones(blocks, layers, size))
        self.shift = nn.Parameter(torch.zeros(blocks, layers, size))
        self.rate = nn.Parameter(torch.zeros(layers))  # log of η in units of ``unit``
        self.ridge = nn.Parameter(torch.zeros(layers))  # λ
        self.mean: Tensor
        self.std: Tensor
        self.unit: Tensor
        self.register_buffer("mean", torch.zeros(layers, size))
        self.register_buffer("std", torch.ones(layers, size))
        self.register_buffer("unit", torch.ones(layers))

    @torch.no_grad()
    def fit(self, K: Sequence[Tensor], G: Sequence[Tensor], lengths: Tensor) -> None:
        """Take units from a sample: inputs to mean 0 and deviation 1, D to a share START of ``lengths`` (L,), the outputs'
        mean length, and e^λ to the mean ‖k‖².
        """
        for i, (k, g) in enumerate(zip(K, G, strict=True)):
            x = torch.cat([k, g], 1)
            self.mean[i], self.std[i] = x.mean(0), x.std(0).clamp_min(1e-8 * float(x.abs().max()) + 1e-30)
            self.ridge[i] = k.square().sum(1).mean().log()
        for i, (k, g) in enumerate(zip(K, G, strict=True)):
            moved = self._one(i, k, g)[0].norm(dim=1).mean()
            self.unit[i] *= START * lengths[i] / moved.clamp_min(1e-30)

    def forward(self, K: Sequence[Tensor], G: Sequence[Tensor]) -> list[Tensor]:
        """D of each layer, lowest first, (n, d), for keys K (n, p) and value gradients G (n, d)."""
        out: list[Tensor] = []
        below: Tensor | None = None
        for i, (k, g) in enumerate(zip(K, G, strict=True)):
            D, pseudo = self._one(i, k, g)
            out.append(orthogonal(D, below) if self.spread and below is not None else D)
            below = pseudo
        return out

    def _one(self, i: int, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """D and g̃ of layer i, (n, d) each."""
        x = (torch.cat([k, g], 1) - self.mean[i]) / self.std[i]
        for down, up, bias, scale, shift in zip(self.down, self.up, self.bias, self.scale, self.shift, strict=True):
            inner = (x @ down @ up + bias).clamp(min=0)  # not relu: its gradient at 0 is 0, where all begins
            x = x + scale[i] * inner + shift[i]
        pseudo_key, pseudo = x[:, : self.p], x[:, self.p :]
        strength = (k * pseudo_key).sum(1, keepdim=True) * self.rate[i].exp() * self.unit[i]
        return -strength * pseudo, pseudo

    def shifts(self, K: Sequence[Tensor], D: Sequence[Tensor]) -> list[Tensor]:
        """ΔW (d, p) of each layer."""
        return [ridge(k, x, self.ridge[i].exp()).T for i, (k, x) in enumerate(zip(K, D, strict=True))]


def orthogonal(D: Tensor, below: Tensor) -> Tensor:
    """D (n, d) less its part along ``below`` (n, d), row by row (arXiv 2601.11441: the orthogonal residual spread)."""
    size = below.square().sum(1, keepdim=True).clamp_min(torch.finfo(below.dtype).tiny)
    return D - (D * below).sum(1, keepdim=True) / size * below


def ridge(K: Tensor, D: Tensor, strength: Tensor) -> Tensor:
    """(KᵀK + s I)⁻¹ Kᵀ D, (p, d), of K (n, p) and D (n, d), by the smaller of the two systems (n or p)."""
    n, p = K.shape
    eye = strength * torch.eye(min(n, p), dtype=K.dtype, device=K.device)
    if n < p:
        return K.T @ torch.linalg.solve(K @ K.T + eye, D)
    return torch.linalg.solve(K.T @ K + eye, K.T @ D)


def keys_and_gradients(
    model: nn.Module, projections: Sequence[Projection], rows: Rows, weights: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], float]:
    """k (n, p) and g (n, d), float32 at least, at every answer token, by layer; and the loss, whose gradient by what the
    layer writes g is: the rows' mean NLLs, weighted by ``weights`` (B,) where they are given, and summed.
    """
    asked = rows.targets >= 0
    at = rows.positions[asked]
    row = asked.nonzero()[:, 0]

    def at_answers(x: Tensor) -> Tensor:
        x = by_row(x, len(asked))
        return _exact(x[row.to(x.device), at.to(x.device)])

    with frozen(model), open_outputs(model, projections, at_answers) as (keys, leaves), torch.enable_grad():
        losses = nll(model, rows)
        loss = (losses if weights is None else losses * weights).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
    for numbers in (loss[None], *keys.values(), *found):
        finite(numbers.abs(), model)
    device = asked.device
    return [k.to(device) for k in keys.values()], [at_answers(g).to(device) for g in found], float(loss.detach())


def nll(model: nn.Module, rows: Rows) -> Tensor:
    """Mean NLL a token of each row's answer, (B,) nats."""
    return token_nll(log_probabilities(model, rows), rows.targets, rows.targets >= 0)


def _exact(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def shifted(model: nn.Module, projections: Sequence[Projection], shifts: Sequence[Tensor]) -> Iterator[None]:
    """The model with ΔW (d, p) added to each projection's weight inside the block, differentiable by it."""

    def adding(shift: Tensor) -> Any:
        return lambda _, args, out: out + (args[0] @ shift.T.to(args[0])).view_as(out)

    hooks = [
        model.get_submodule(p.name).register_forward_hook(adding(x)) for p, x in zip(projections, shifts, strict=True)
    ]
    with hooked(hooks):
        yield
