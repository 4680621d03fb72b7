"""Is this the weight a patch was made for? Bytes first, and if only the dtype differs, a sample of its entries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.patch.record import BaseTensor
from mosectl.storage.checkpoint import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAMPLE = 64


def sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's raw bytes."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def fingerprint(name: str, weight: Tensor) -> BaseTensor:
    """Fingerprint of the weight called ``name``, as it is stored (not re-oriented); of several experts', the first's."""
    weight = _first(weight)
    return BaseTensor(name, tuple(weight.shape), NAMES[weight.dtype], sha256(weight), _sample(weight))


def _first(weight: Tensor) -> Tensor:
    """A matrix itself, or the first of the experts' in one tensor."""
    return weight[0] if weight.dim() == 3 else weight


def _sample(weight: Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    index = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), dtype=torch.float64).long()
    return tuple(flat[index.to(flat.device)].double().tolist())


def distance(base: BaseTensor, weight: Tensor) -> float:
    """‖sample of weight − the base's sample‖ / ‖the base's sample‖."""
    ours, theirs = (torch.tensor(x, dtype=torch.float64) for x in (_sample(_first(weight)), base.sample))
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Match:
    """Result of comparing a weight with the base a patch was made for."""

    same: bool
    exact: bool  # same bytes
    note: str  # what was compared, with numbers; the reason when not the same
    fits: bool = True  # it has the base's shape


def match(base: BaseTensor, weight: Tensor) -> Match:
    """Compare: same bytes, or the same weights rounded to another dtype, or another base."""
    weight = _first(weight)
    if tuple(weight.shape) != base.shape:
        return Match(False, False, f"shape {list(weight.shape)}, the patch was made for {list(base.shape)}", False)
    dtype = NAMES.get(weight.dtype, str(weight.dtype))
    if dtype == base.dtype:
        same = sha256(weight) == base.sha256
        return Match(
            same, same, "sha256 matches" if same else f"sha256 differs from the patch's base {base.sha256[:12]}"
        )
    eps = max(torch.finfo(d).eps for d, n in NAMES.items() if n in (dtype, base.dtype))
    ours, theirs = torch.tensor(_sample(weight)), torch.tensor(base.sample)
    # Half an eps of relative rounding, and fp16's subnormals below it.
    allowed = 0.51 * eps * torch.maximum(ours.abs(), theirs.abs()) + 2.0**-24
    same = bool(((ours - theirs).abs() <= allowed).all())
    if same:
        return Match(
            True, False, f"the same weights as {dtype}, made for {base.dtype}: exact within {eps / 2:.0e} relative"
        )
    return Match(False, False, f"{dtype} weights that are not a rounding of the patch's {base.dtype} base")
