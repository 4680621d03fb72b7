"""What a patch file is, without a model; with one, what it does to the weights as they are stored there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mosectl.checkpoints.base import layout
from mosectl.errors import BaseMismatch
from mosectl.hub.place import local
from mosectl.linalg.rotation import Compact, angles, orthogonality_error, product_svd
from mosectl.linalg.spectrum import Stability, stability
from mosectl.patch.change import COMPACT, changed
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import match
from mosectl.patch.finite import check_changed, check_weight
from mosectl.storage.checkpoint import Checkpoint, open_checkpoint

RANK_TOLERANCE = 1e-3  # share of the largest singular value of R − I that still counts as a direction


@dataclass(frozen=True)
class FactorReport:
    """One rotation R (n, n) of a patch, on either side, or the product B A of an additive one."""

    module: str
    factor: str  # as the file names it: "R" (L of W' = L W R), "R_in" (R of it), or "B A"
    form: str  # "dense" or "compact"
    shape: tuple[int, int]
    orthogonality_error: float | None  # ‖RᵀR − I‖_F / √n; None for an additive change
    largest_angle: float | None  # degrees
    median_angle: float | None
    rank: int  # directions of R − I, or of B A, above RANK_TOLERANCE of the strongest
    left_out: float | None  # share of the edit's effect that the compact form of the module's rotations leaves out
    distance: float  # ‖R − I‖_F / √n, or ‖B A‖_F
    base: str  # how the model's weight compares with the patch's base; "" without a model
    stability: Stability | None  # on the model's stored dtype


@dataclass(frozen=True)
class Inspection:
    """A patch and what was found about it."""

    patch: Patch
    file_bytes: int
    factors: tuple[FactorReport, ...]


def inspect(path: str | Path, *, model: str | Path | None = None, revision: str | None = None) -> Inspection:
    """Read and check a patch; with ``model`` compare norms, condition numbers and spectra before and after.

    Raises:
        PatchError: the file is not a valid patch. BaseMismatch: the model has no such modules. ModelError, HubError.
        EditFailed: the changed weights would not be finite.
    """
    path = local(path)
    patch = Patch.load(path)
    checkpoint = open_checkpoint(model, revision) if model is not None else None
    effects = dict(_effects(patch, checkpoint)) if checkpoint else {}
    factors = tuple(
        report for name in patch.changes for report in _factors(patch, name, *effects.get(name, ("", None)))
    )
    return Inspection(patch, Path(path).stat().st_size, factors)


def _factors(patch: Patch, module: str, base: str, drift: Stability | None) -> Iterator[FactorReport]:
    change = patch.changes[module]
    f = change.factors
    if "A" in f:
        strengths = product_svd(f["B"].double(), f["A"].double())[1]
        shape = (len(f["B"]), f["A"].shape[1])
        yield FactorReport(
            module,
            "B A",
            "compact",
            shape,
            None,
            None,
            None,
            _rank(strengths),
            None,
            float(strengths.norm()),
            base,
            drift,
        )
        return
    left_out = patch.metrics.get("compaction", {}).get(module)
    for name in COMPACT:
        R = change.rotation(name)
        if R is None:
            continue
        core = R.Q if isinstance(R, Compact) else R
        n = len(R.U) if isinstance(R, Compact) else len(R)
        turned = angles(core)
        chords = 2 * torch.sin(torch.deg2rad(turned) / 2)  # singular values of R − I; where U does not reach they are 0
        yield FactorReport(
            module=module,
            factor=name,
            form="compact" if isinstance(R, Compact) else "dense",
            shape=(n, n),
            orthogonality_error=_orthogonality_error(R),
            largest_angle=float(turned[0]),
            median_angle=float(turned.median()),
            rank=_rank(chords),
            left_out=left_out,
            distance=float(chords.norm() / n**0.5),
            base=base,
            stability=drift,
        )


def _orthogonality_error(R: Tensor | Compact) -> float:
    """‖RᵀR − I‖_F / √n; a compact rotation deviates by what U and Q deviate, without an (n, n) matrix."""
    if isinstance(R, Tensor):
        return orthogonality_error(R)
    U = torch.linalg.qr(R.U)[1]  # (r, r): all that is not the identity happens in U's span
    inside = Compact(U, R.Q).dense()
    return orthogonality_error(inside) * (len(inside) / len(R.U)) ** 0.5


def _rank(strengths: Tensor) -> int:
    """How many of the singular values, largest first, count."""
    return int((strengths > RANK_TOLERANCE * strengths[0]).sum()) if float(strengths[0]) > 0 else 0


def _effects(patch: Patch, checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[str, Stability | None]]]:
    arch, names = layout(checkpoint)
    projections = {p.name: p for p in arch.projections}
    for module, change in patch.changes.items():
        if module not in projections:
            raise BaseMismatch(
                f"no module '{module}' in this {arch.model_type} model",
                where=checkpoint.model,
                fix=f"the patch is for {patch.model}",
            )
        first = names[module][0]
        W = checkpoint.read(first)
        found = match(patch.base[module], W)
        drift = None
        if found.same:
            W = projections[module].oriented(W)
            check_weight(first, W, str(checkpoint.folder))
            result = changed([change], W)
            check_changed(first, W, result, [change], [patch.id])
            drift = stability(first, W, result)
        yield module, (found.note, drift)
