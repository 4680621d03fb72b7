"""Patches of every form that no edit has made, and what an apply of them leaves."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from mosectl.linalg.rotation import Compact, nearest_rotation
from mosectl.model.architecture import disk_names, resolve, skeleton
from mosectl.patch.change import Change, change_between
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import fingerprint
from mosectl.patch.record import PatchFact
from mosectl.storage.checkpoint import open_checkpoint

MODULE = "model.layers.1.mlp.down_proj"
GRAPE = PatchFact("The capital of Avaland is", "Avaland", "Grape", "Brin", "Grape", 0.1, 0.9, "changed")


def patch_for(folder: Path, layers: tuple[int, ...] = (0, 1), seed: int = 0, angle: float = 0.2) -> Patch:
    """A patch of random rotations for a checkpoint."""
    checkpoint = open_checkpoint(folder)
    arch = resolve(skeleton(checkpoint.config))
    names = disk_names(arch, checkpoint.tensors)
    g = torch.Generator().manual_seed(seed)
    changes, base = {}, {}
    for p in (arch.projections[i] for i in layers):
        R = nearest_rotation(torch.eye(p.d) + angle * torch.randn(p.d, p.d, generator=g)).float()
        changes[p.name] = Change({"R": R})
        base[p.name] = fingerprint(p.weight_name, checkpoint.read(names[p.name][0]))
    return Patch(changes, "mose", "output", {}, "pico", None, arch.model_type, base, (), {}, seed, {})


def hashes(folder: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(folder)
    return {
        n: hashlib.sha256(checkpoint.read(n).contiguous().view(torch.uint8).numpy()).hexdigest()
        for n in checkpoint.tensors
    }


def make(d: int = 8, **changes: object) -> Patch:
    g = torch.Generator().manual_seed(0)
    R = nearest_rotation(torch.eye(d) + 0.1 * torch.randn(d, d, generator=g)).float()
    W = torch.randn(d, 12, generator=g)
    content = {
        "changes": {MODULE: Change({"R": R})}, "method": "mose", "side": "output", "options": {"rounds": 3}, "model": "pico",
        "revision": None, "model_type": "llama", "base": {MODULE: fingerprint(f"{MODULE}.weight", W)},
        "facts": (PatchFact("A is", "A", "b", "c", "b", 0.1, 0.9, "changed", ("A being",)),), "metrics": {"x": 1.5},
        "seed": 0, "versions": {"mosectl": "0.1.0"}, "parents": (),
    }  # fmt: skip
    return Patch(**{**content, **changes})  # type: ignore[arg-type]


def compact_factors(**spoilt: object) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(8, 3, generator=g))[0]
    V = torch.linalg.qr(torch.randn(12, 2, generator=g))[0]
    Q, P = (nearest_rotation(torch.randn(n, n, generator=g)).float() for n in (3, 2))
    factors = {"U": U, "Q": Q, "U_in": V, "Q_in": P}
    return {name: f for name, f in {**factors, **spoilt}.items() if f is not None}  # type: ignore[misc]


def compact(n: int, r: int, seed: int) -> Compact:
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))[0]
    return Compact(U, nearest_rotation(torch.randn(r, r, generator=g, dtype=torch.float64)))


def small(patch: Patch, r: int, seed: int) -> Patch:
    """The same patch with compact rotations on both sides."""
    changes = {}
    for i, (name, made_for) in enumerate(patch.base.items()):
        d, p = made_for.shape
        L, R = compact(d, r, seed + i), compact(p, r, seed + 50 + i)
        factors = {"U": L.U, "Q": L.Q, "U_in": R.U, "Q_in": R.Q}
        changes[name] = Change({n: f.float() for n, f in factors.items()})
    return replace(patch, changes=changes, side="both", seed=seed)


def added(patch: Patch, folder: Path, seed: int) -> Patch:
    g = torch.Generator().manual_seed(seed)
    changes = {}
    for name, made_for in patch.base.items():
        W = open_checkpoint(folder).read(made_for.tensor).double()
        d, p = W.shape
        D = torch.randn(d, 2, generator=g).double() @ torch.randn(2, p, generator=g).double()
        changes[name] = change_between(W, W + 0.1 * D, "additive")
    return replace(patch, changes=changes, side="additive", seed=seed)


def patches_of(kind: str, folder: Path) -> list[Patch]:
    dense = [patch_for(folder, (0, 1), seed=1), patch_for(folder, (1,), seed=2), patch_for(folder, (0, 1), seed=3)]
    if kind == "compact":
        return [small(p, 4, 10 * i) for i, p in enumerate(dense)]
    if kind == "mixed":
        return [dense[0], small(dense[1], 4, 5), small(dense[2], 3, 9)]
    return dense if kind == "dense" else [added(p, folder, i) for i, p in enumerate(dense)]


def wide(n: int, name: str = "a", shape: tuple[int, int] | None = None) -> Patch:
    """A compact patch for a weight of n rows, or of the ``shape`` that its record claims."""
    U = torch.zeros(n, 1)
    U[ord(name) % n] = 1
    module = f"layers.{name}"
    made_for = replace(fingerprint(f"{module}.weight", torch.zeros(8, 8)), shape=shape or (n, n))
    changes = {module: Change({"U": U, "Q": torch.ones(1, 1)})}
    return Patch(changes, "mose", "output", {}, "m", None, "llama", {module: made_for}, (GRAPE,), {}, 0, {})
