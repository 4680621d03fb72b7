"""The weights of a live model's edited layers: read, set, exchanged in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mosectl.errors import ModelError
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection


def solve_device(device: torch.device) -> torch.device:
    """Where float64 work for weights on ``device`` is done: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The live weight of one projection that is a matrix (or a mixture's turn).

    Raises:
        ModelError: it is offloaded, where a change in place would be lost.
    """
    (weight,) = weights_of(model, projection)
    return weight


def weights_of(model: nn.Module, projection: Projection) -> list[Tensor]:
    """The live weights of one projection: its matrix, or the experts' (experts, d, p) and the shared one's (d, p).

    Raises:
        ModelError: they are offloaded.
    """
    found = projection.live_weights(model)
    if any(weight.is_meta for weight in found):
        raise ModelError("the weight is offloaded", where=projection.name, fix="load the model without offloading")
    return found


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


@contextmanager
def turns(model: nn.Module, arch: Architecture) -> Iterator[Architecture]:
    """Inside the block every projection is one matrix that can be set: a mixture of experts has a turn behind it."""
    with ExitStack() as stack:
        ones = tuple(stack.enter_context(p.as_one_matrix(model)) for p in arch.projections)
        yield replace(arch, projections=ones)
