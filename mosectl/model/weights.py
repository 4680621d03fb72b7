"""The weights of a live model's edited layers: read, set, exchanged in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mosectl.errors import ModelError
from mosectl.model.architecture import Projection


def solve_device(device: torch.device) -> torch.device:
    """Where float64 work for weights on ``device`` is done: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The live weight of one projection that is a matrix (or a mixture's turn).

    Raises:
        ModelError: it is offloaded, where a change in place would be lost.
    """
    return _here(model.get_submodule(projection.name).weight, projection)  # type: ignore[arg-type]


def weights_of(model: nn.Module, projection: Projection) -> list[Tensor]:
    """The live weights of one projection: its matrix, or the experts' (experts, d, p) and the shared one's (d, p).

    Raises:
        ModelError: they are offloaded.
    """
    if not projection.experts:
        return [weight_of(model, projection)]
    block = model.get_submodule(projection.name)
    found = [block.experts.down_proj]  # type: ignore[union-attr]
    if projection.shared:
        found.append(block.get_submodule(projection.shared).weight)
    return [_here(w, projection) for w in found]  # type: ignore[arg-type]


def _here(weight: Tensor, projection: Projection) -> Tensor:
    if weight.is_meta:
        raise ModelError("the weight is offloaded", where=projection.name, fix="load the model without offloading")
    return weight


def as_live(projection: Projection, stored: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a checkpoint, in the order of ``arch.disk_names``, as the live model holds them: experts in one tensor."""
    if not projection.experts or stored[0].dim() == 3:
        return list(stored)
    return [torch.stack(list(stored[: projection.experts])), *stored[projection.experts :]]


def set_weight(model: nn.Module, projection: Projection, W: Tensor) -> None:
    """Set a live weight to W (d, p), rounded once to the model's type."""
    with torch.no_grad():
        weight_of(model, projection).copy_(projection.stored(W))


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Each live weight with another value inside the block, afterwards bit for bit what it was.

    Args:
        pairs: weight and value, taken one after the other: of values that are computed only one is there at a time.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, value in pairs:
                before.append((weight, weight.detach().clone()))
                weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for weight, old in before:
                weight.copy_(old)
