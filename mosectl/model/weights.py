"""The weights of a live model's edited layers: read, set, exchanged in place."""

from __future__ import annotations

import hashlib
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


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """A hash of all weights, for telling a model from its edited self: of the sums of their bits, so a device stays fast.

    Not for telling strangers' weights apart: see :func:`mosectl.patch.fingerprint.sha256`.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.numel():
            continue
        bits = weight.detach().contiguous().view(-1, weight.shape[-1] if weight.dim() else 1)
        for sums in (bits.view(_WORDS[weight.element_size()]).sum(axis, dtype=torch.int64) for axis in (0, 1)):
            found.update(name.encode() + sums.cpu().numpy().tobytes())
    return found.hexdigest()


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
