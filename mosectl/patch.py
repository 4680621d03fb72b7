"""The patch file, `mosectl-patch` format 1: a safetensors file of rotations (or of low-rank additions) with one record.

Specified in patches/FORMAT.md. Everything is checked on reading: a patch comes from strangers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mosectl.change import SIDES, Change
from mosectl.errors import PatchError
from mosectl.files import write_tensors
from mosectl.rotation import is_rotation, orthogonality_error, orthogonality_tolerance

FORMAT = 1
KEY = "mosectl"
EDITOR_KEY = "mosectl-editor"  # of a trained editor's file
_NAME = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)\.(R|R_in|U|Q|U_in|Q_in|A|B)", re.ASCII)
_MAX_HEADER = 100_000_000  # safetensors' own limit
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BaseTensor:
    """What one edited weight was before the edit."""

    tensor: str  # weight name in the model, e.g. "model.layers.5.mlp.down_proj.weight"; of a mixture the first expert's
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", "F16", "F32"
    sha256: str  # of the raw bytes
    sample: tuple[float, ...]  # evenly spaced entries: recognises the same weights in another dtype

    @staticmethod
    def of(entry: Mapping[str, Any]) -> BaseTensor:
        """From a record's entry."""
        return BaseTensor(**{**entry, "shape": tuple(entry["shape"]), "sample": tuple(map(float, entry["sample"]))})


@dataclass(frozen=True)
class PatchFact:
    """One edited fact with what the model said before and after."""

    prompt: str
    subject: str
    target_new: str
    before: str
    after: str
    probability_before: float
    probability_after: float
    status: str  # "changed", "already known", "not reached", "not finite"
    wordings: tuple[str, ...] = ()  # other prompts that were edited along with it, the model's own


@dataclass(frozen=True)
class Patch:
    """What changes in each edited weight, by module path and in the order of the layers, and how it came about."""

    changes: Mapping[str, Change] = field(repr=False)
    method: str
    side: str
    options: dict[str, Any]
    model: str
    revision: str | None
    model_type: str
    base: Mapping[str, BaseTensor] = field(repr=False)  # by module path, same keys as changes
    facts: tuple[PatchFact, ...] = field(repr=False)
    metrics: dict[str, Any]
    seed: int
    versions: dict[str, str]
    parents: tuple[str, ...] = field(default=())  # ids of the patches it was computed on top of

    @property
    def record(self) -> str:
        """Everything but the tensors as canonical JSON: sorted keys, no spaces, no dates."""
        return canonical(self._content())

    def _content(self) -> dict[str, Any]:
        content = {k: v for k, v in vars(self).items() if k != "changes"}
        content["base"] = {name: asdict(t) for name, t in self.base.items()}
        content["facts"] = [asdict(f) for f in self.facts]
        return {"format": FORMAT, **content}

    @property
    def id(self) -> str:
        """sha256 over the record and every tensor's name, shape and little-endian bytes, in name order."""
        return content_id(self.record, self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every factor under its name in the file, such as "model.layers.5.mlp.down_proj.R"."""
        return {f"{module}.{kind}": f for module, c in self.changes.items() for kind, f in c.factors.items()}

    def save(self, path: str | Path) -> None:
        """Write the patch atomically; the same patch gives the same bytes.

        Raises:
            OutputError: the file cannot be written.
        """
        write_tensors(Path(path), self.tensors, {KEY: canonical({**self._content(), "id": self.id})})

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch file.

        Raises:
            PatchError: anything in it is not as patches/FORMAT.md says; the message names what and where.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError as e:
            raise PatchError("no such patch file", where=str(path), fix="check the path") from e
        except OSError as e:
            raise PatchError(f"cannot read the patch: {e.strerror}", where=str(path), fix="give a patch file") from e
        try:
            return parse(data)
        except PatchError as e:
            raise type(e)(e.what, where=f"{path}: {e.where}" if e.where else str(path), fix=e.fix) from e


def content_id(record: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a record and every tensor's name, shape and little-endian bytes, in name order."""
    digest = hashlib.sha256(record.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\0{name}{list(x.shape)}\0".encode())
        digest.update(x.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def canonical(content: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces; numbers that are not finite are refused.

    Raises:
        ValueError.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse(data: bytes) -> Patch:
    """Check every byte of a patch file and return the patch.

    Raises:
        PatchError: with the tensor or record field that is wrong.
    """
    header = _header(data)
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and EDITOR_KEY in metadata:
        fix = "use it with: mosectl edit FACTS --method horse --editor FILE"
        raise PatchError("a trained editor, not a patch", fix=fix)
    if not isinstance(metadata, dict) or set(metadata) != {KEY} or not isinstance(metadata[KEY], str):
        raise PatchError("not a mosectl patch", where="__metadata__", fix="give a file made by mosectl edit")
    record = _json(metadata[KEY].encode(), "record")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise PatchError(f"unknown patch format {found!r}", where="record", fix="update mosectl")
    _check_layout(header, len(data) - 8 - int.from_bytes(data[:8], "little"))
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise PatchError(f"damaged file: {e}", fix="fetch the patch again") from e
    for name, factor in tensors.items():
        _check_factor(name, factor)
    patch = _from_record(record, _changes(tensors))
    if record["id"] != patch.id:
        what = "the content is not what its id says: damaged or altered"
        raise PatchError(what, where="record.id", fix="fetch the patch again")
    return patch


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Tensors by name to changes by module, in the order of the layers: safetensors gives them in any order."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors, key=_by_layer):
        module, _, kind = name.rpartition(".")
        found.setdefault(module, {})[kind] = tensors[name]
    return {module: Change(factors) for module, factors in found.items()}


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(_MAX_HEADER, len(data) - 8):
        raise PatchError(
            "not a safetensors file, or cut short", fix="give a patch made by mosectl edit; fetch it again if it is one"
        )
    header = _json(data[8 : 8 + size], "header")
    if not isinstance(header, dict):
        raise PatchError("not a safetensors file", where="header", fix="fetch the patch again")
    return header


def metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, be it cut short; empty where there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            data = start + file.read(min(int.from_bytes(start, "little"), _MAX_HEADER))
        found = _header(data).get("__metadata__")
    except (OSError, PatchError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(raw: bytes, where: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, no bottomless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) != len(keys):
            twice = next(k for k in keys if keys.count(k) > 1)
            raise PatchError(f"the name '{twice}' stands twice", where=where, fix="do not use this patch")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise PatchError(f"{constant} is not a number", where=where, fix="do not use this patch")

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):  # "1e999"
            refuse(text)
        return float(text)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as e:
        raise PatchError(f"damaged JSON: {e}", where=where, fix="fetch the patch again") from e


def _check_layout(header: dict[str, Any], data_size: int) -> None:
    """Names, dtypes, shapes and offsets of every tensor: whole, float32, without holes or overlaps."""
    end = 0
    spans = []
    for name, entry in header.items():
        found = _NAME.fullmatch(name)
        if not found:
            fix = "a patch holds only '<module>.R', '.U', '.Q', the same with '_in', '.A' and '.B'"
            raise PatchError(f"tensor name {name!r} is not allowed", where="header", fix=fix)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise PatchError("malformed tensor entry", where=name, fix="fetch the patch again")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or not _integers(shape, 2) or min(shape) < 1:
            raise PatchError(f"must be an F32 matrix, found {entry['dtype']} {shape}", where=name)
        if found[2].startswith(("R", "Q")) and shape[0] != shape[1]:
            raise PatchError(f"a rotation must be a square F32 matrix, found {shape}", where=name)
        if not _integers(offsets, 2) or offsets[1] - offsets[0] != 4 * shape[0] * shape[1]:
            raise PatchError(f"data offsets {offsets} do not fit shape {shape}", where=name)
        spans.append((*offsets, name))
    for start, stop, name in sorted(spans):
        if start != end:
            raise PatchError("tensors overlap or leave a hole", where=name, fix="do not use this patch")
        end = stop
    if not spans:
        raise PatchError("the patch changes nothing", fix="fetch the patch again")
    if end != data_size:
        raise PatchError(f"the file holds {data_size} bytes of tensors, its header says {end}", fix="fetch it again")


def _integers(value: Any, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _check_factor(name: str, factor: Tensor) -> None:
    if not bool(torch.isfinite(factor).all()):
        raise PatchError("holds NaN or infinite numbers", where=name, fix="do not use this patch")
    if name.endswith((".A", ".B")):
        return
    if name.endswith((".U", ".U_in")):
        n, r = factor.shape
        if r > n or orthogonality_error(factor) > orthogonality_tolerance(n):
            raise PatchError("its columns are not orthonormal", where=name, fix="do not use this patch")
        return
    if is_rotation(factor):
        return
    error, limit = orthogonality_error(factor), orthogonality_tolerance(len(factor))
    why = f"‖RᵀR−I‖/√d = {error:.1e}, allowed {limit:.1e}" if error > limit else "a reflection, det R = −1"
    raise PatchError(f"is not a rotation ({why})", where=name, fix="do not use this patch")


def _from_record(record: dict[str, Any], changes: dict[str, Change]) -> Patch:
    """Build the patch, checking every field's type."""
    _check_fields({"id": record.get("id")}, {"id": str}, "record")
    fields = {k: v for k, v in record.items() if k not in ("format", "id")}
    expected = {
        "method": str, "side": str, "options": dict, "model": str, "revision": (str, type(None)), "model_type": str,
        "base": dict, "facts": list, "metrics": dict, "seed": int, "versions": dict, "parents": list,
    }  # fmt: skip
    _check_fields(fields, expected, "record")
    if fields["side"] not in SIDES:
        raise PatchError(f"side '{fields['side']}' is not known", where="record.side", fix="update mosectl")
    for module, change in changes.items():
        if change.side() != fields["side"]:
            what = f"holds {', '.join(change.factors)}, which is not side '{fields['side']}'"
            raise PatchError(what, where=module, fix="do not use this patch")
    if set(fields["base"]) != set(changes):
        raise PatchError("base tensors and changes do not match", where="record.base", fix="do not use this patch")
    if not all(isinstance(p, str) and _SHA256.fullmatch(p) for p in fields["parents"]):
        raise PatchError("a parent is not a patch id", where="record.parents", fix="do not use this patch")
    base = {name: _base_tensor(entry, name, changes[name]) for name, entry in fields["base"].items()}
    facts = tuple(_patch_fact(entry, i) for i, entry in enumerate(fields["facts"]))
    return Patch(changes, **{**fields, "base": base, "facts": facts, "parents": tuple(fields["parents"])})


def _check_fields(found: Any, expected: Mapping[str, Any], where: str) -> None:
    if not isinstance(found, dict) or set(found) != set(expected):
        names = set(found) ^ set(expected) if isinstance(found, dict) else expected
        raise PatchError(f"fields missing or unknown: {', '.join(sorted(names))}", where=where, fix="update mosectl")
    for name, kind in expected.items():
        value = found[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise PatchError(f"'{name}' has the wrong type", where=where, fix="fetch the patch again")


def _base_tensor(entry: Any, name: str, change: Change) -> BaseTensor:
    where = f"record.base.{name}"
    _check_fields(entry, {"tensor": str, "shape": list, "dtype": str, "sha256": str, "sample": list}, where)
    if not _integers(entry["shape"], 2) or not _fits(change, *entry["shape"]):
        sizes = ", ".join(f"{kind} {list(f.shape)}" for kind, f in change.factors.items())
        raise PatchError(f"shape {entry['shape']} does not fit {sizes}", where=where)
    if not _SHA256.fullmatch(entry["sha256"]) or not entry["sample"] or not all(map(_is_number, entry["sample"])):
        raise PatchError("malformed fingerprint", where=where, fix="fetch the patch again")
    if entry["tensor"] not in (f"{name}.weight", f"{name}.experts.0.down_proj.weight"):
        raise PatchError(f"tensor '{entry['tensor']}' does not belong to this module", where=where)
    return BaseTensor.of(entry)


def _fits(change: Change, *shape: int) -> bool:
    """Do the factors fit a weight of this shape, stored as (d, p) or as (p, d)?"""
    f = {kind: tuple(factor.shape) for kind, factor in change.factors.items()}
    inner = all(f[a][1] == f[b][0] for a, b in (("U", "Q"), ("U_in", "Q_in"), ("B", "A")) if a in f)
    return inner and any(
        all(f[kind][0] == d for kind in ("R", "U", "B") if kind in f)
        and all(f[kind][0] == p for kind in ("R_in", "U_in") if kind in f)
        and all(f[kind][1] == p for kind in ("A",) if kind in f)
        for d, p in (shape, shape[::-1])
    )


def _patch_fact(entry: Any, i: int) -> PatchFact:
    text = ("prompt", "subject", "target_new", "before", "after", "status")
    numbers = ("probability_before", "probability_after")
    where = f"record.facts[{i}]"
    _check_fields(entry, {**dict.fromkeys(text, str), **dict.fromkeys(numbers, (int, float)), "wordings": list}, where)
    if not all(isinstance(w, str) for w in entry["wordings"]):
        raise PatchError("'wordings' is not a list of texts", where=where, fix="fetch the patch again")
    return PatchFact(**{**entry, "wordings": tuple(entry["wordings"])})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
