"""What a patch file is, without a model; with one, what it does to the weights as they are stored there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mosectl.arch import disk_names, resolve, skeleton
from mosectl.checkpoint import Checkpoint, open_checkpoint
from mosectl.errors import BaseMismatch
from mosectl.fingerprint import match
from mosectl.metrics import Stability, stability
from mosectl.patch import Patch
from mosectl.rotation import angles, orthogonality_error, rotate

RANK_TOLERANCE = 1e-3  # share of the largest singular value of R − I that still counts as a direction


@dataclass(frozen=True)
class RotationReport:
    """One rotation R (d, d) of a patch."""

    module: str
    d: int
    orthogonality_error: float  # ‖RᵀR − I‖_F / √d
    largest_angle: float  # degrees
    median_angle: float
    rank: int  # directions of R − I above RANK_TOLERANCE of the strongest
    distance: float  # ‖R − I‖_F / √d
    base: str  # how the model's weight compares with the patch's base; "" without a model
    stability: Stability | None  # on the model's stored dtype


@dataclass(frozen=True)
class Inspection:
    """A patch and what was found about it."""

    patch: Patch
    file_bytes: int
    rotations: tuple[RotationReport, ...]


def inspect(path: str | Path, *, model: str | Path | None = None, revision: str | None = None) -> Inspection:
    """Read and check a patch; with ``model`` compare norms, condition numbers and spectra before and after.

    Raises:
        PatchError: the file is not a valid patch. BaseMismatch: the model has no such modules. ModelError, HubError.
    """
    patch = Patch.load(path)
    checkpoint = open_checkpoint(model, revision) if model is not None else None
    effects = dict(_effects(patch, checkpoint)) if checkpoint else {}
    rotations = tuple(_rotation(name, R, *effects.get(name, ("", None))) for name, R in patch.rotations.items())
    return Inspection(patch, Path(path).stat().st_size, rotations)


def _rotation(module: str, R: Tensor, base: str, drift: Stability | None) -> RotationReport:
    turned = angles(R)
    chords = 2 * torch.sin(torch.deg2rad(turned) / 2)  # singular values of R − I
    return RotationReport(
        module=module,
        d=len(R),
        orthogonality_error=orthogonality_error(R),
        largest_angle=float(turned[0]),
        median_angle=float(turned.median()),
        rank=int((chords > RANK_TOLERANCE * chords[0]).sum()) if float(chords[0]) > 0 else 0,
        distance=float(chords.norm() / len(R) ** 0.5),
        base=base,
        stability=drift,
    )


def _effects(patch: Patch, checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[str, Stability | None]]]:
    arch = resolve(skeleton(checkpoint.config))
    names = disk_names(arch, checkpoint.tensors)
    projections = {p.name: p for p in arch.projections}
    for module, R in patch.rotations.items():
        if module not in projections:
            raise BaseMismatch(
                f"no module '{module}' in this {arch.model_type} model",
                where=checkpoint.model,
                fix=f"the patch is for {patch.model}",
            )
        W = checkpoint.read(names[module])
        found = match(patch.base[module], W)
        drift = None
        if found.same:
            W = projections[module].oriented(W)
            drift = stability(names[module], W, rotate(R, W))
        yield module, (found.note, drift)
