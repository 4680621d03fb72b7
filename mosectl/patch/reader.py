"""Reading a patch file: the header, the record and what the tensors claim are checked first, then each tensor as it is read.

What patches/FORMAT.md allows and nothing else: a patch comes from strangers. :func:`described` is all that can be checked
without the tensors, for a file on this disk and for one on the Hub.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, BinaryIO

from torch import Tensor

from mosectl.errors import PatchError
from mosectl.linalg.rotation import is_rotation, orthogonality_error, orthogonality_tolerance
from mosectl.patch.change import SIDES, side_of
from mosectl.patch.record import FORMAT, KEY
from mosectl.storage import schema
from mosectl.storage.inputs import parse_json
from mosectl.storage.schema import anything, flag, integer, listed, mapping, number, optional, record, scalar, text
from mosectl.storage.tensor_file import MAX_SIZE, Rows, Span, header_of, layout, read

EDITOR_KEY = "mosectl-editor"  # of a trained editor's file
SAMPLE = 64  # entries of a weight that its fingerprint holds
_LARGEST = 3.5e38  # of float32
_MODULE = r"[A-Za-z_]\w*(?:\.\w+)*"
_NAME = re.compile(rf"({_MODULE})\.(R|R_in|U|Q|U_in|Q_in|A|B)", re.ASCII)
_NAME_LENGTH = 500
DAMAGED, ALTERED = "fetch the patch again", "do not use this patch"
Shapes = Mapping[str, tuple[int, ...]]  # of a module's factors, by kind

# The record, field by field. Options and metrics may hold more than is known here; what is shown or used is checked.

SHA256 = schema.matching(re.compile(r"[0-9a-f]{64}"), "a sha256 (64 hexadecimal digits)")
SIZE = schema.within(1, MAX_SIZE)


def _sampled(value: Any) -> None:
    number(value)
    if abs(value) > _LARGEST:
        raise schema.Misfit(f"{value} is out of range")


def _base(value: Any) -> None:
    _BASE(value)
    if len(value["sample"]) != min(SAMPLE, value["shape"][0] * value["shape"][1]):
        raise schema.Misfit(
            f"malformed fingerprint: {len(value['sample'])} entries of shape {value['shape']}", "sample"
        )


_BASE = record(
    {
        "tensor": text, "shape": listed(SIZE, 2, 2), "dtype": schema.one_of("BF16", "F16", "F32"), "sha256": SHA256,
        "sample": listed(_sampled, 1, SAMPLE),
    }
)  # fmt: skip
BASES = mapping(_base)
_FACT = record(
    {
        **dict.fromkeys(("prompt", "subject", "target_new", "before", "after", "status"), text),
        "probability_before": number, "probability_after": number, "wordings": listed(text),
    },
    {"space_before_target": flag, "target_aliases": listed(text), "right_after": text},
)  # fmt: skip
_DRIFTS = (
    "norm_before",
    "norm_after",
    "condition_before",
    "condition_after",
    "norm_drift",
    "condition_drift",
    "spectrum_drift",
)
_SHARE = record(
    {"metric": text, "group": text, "own": flag, "asked": integer, "qa": optional(number), "strict": optional(number)},
    others=anything,
)
_NEXT = record(
    {"of": text, "group": text, "own": flag, "prompts": integer, "kl": number, "top1": number}, others=anything
)
NOT_COUNTED = listed(record({"metric": text, "group": text, "prompts": integer, "of": integer}))
_METRICS = record(
    {},
    {
        "scores": mapping(scalar),
        "stability": listed(record({"name": text}, dict.fromkeys(_DRIFTS, number), others=anything)),
        "compaction": mapping(number),
        "shares": listed(_SHARE),
        "next_tokens": listed(_NEXT),
        "not_counted": NOT_COUNTED,
    },
    others=anything,
)
_OPTIONS = record(
    {},
    {
        "merged": listed(lambda value: RECORD(value)),
        "corpus": optional(record({}, {"name": text, "sha256": text}, others=scalar)),
        "solver": mapping(scalar), "targets": mapping(scalar), "layers": listed(integer), "editor": optional(text),
        "chat": flag, "dtype": text, "facts": listed(text),
    },
    others=anything,
)  # fmt: skip
RECORD: schema.Check = record(
    {
        "format": schema.one_of(FORMAT), "id": SHA256, "method": text, "side": schema.one_of(*SIDES), "options": _OPTIONS,
        "model": text, "revision": optional(text), "model_type": text, "base": BASES, "facts": listed(_FACT),
        "metrics": _METRICS, "seed": integer, "versions": mapping(text), "parents": listed(SHA256),
    }
)  # fmt: skip


def contents(file: BinaryIO) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The record and the factors (by module and kind, in the order of the layers) of a patch file, all checked but the id.

    Raises:
        PatchError: with the tensor or record field that is wrong.
    """
    entries, metadata, start = header_of(file)
    found, spans = described(entries, metadata, file.seek(0, os.SEEK_END) - start)
    tensors = {}
    for name, factor in read(file, start, spans, _rows_checked()):
        _check_factor(name, factor)
        tensors[name] = factor
    return found, _by_module(tensors)


def described(
    entries: Mapping[str, Any], metadata: Mapping[str, str], data_size: int
) -> tuple[dict[str, Any], dict[str, Span]]:
    """A patch's record and where its tensors lie, checked but for the tensors themselves (and so the id).

    Args:
        entries, metadata: from :func:`mosectl.storage.tensor_file.header_of`.
        data_size: bytes behind the header.
    Raises:
        PatchError: with the tensor or record field that is wrong.
    """
    if EDITOR_KEY in metadata:
        fix = "use it with: mosectl edit FACTS --method horse --editor FILE"
        raise PatchError("a trained editor, not a patch", fix=fix)
    if set(metadata) != {KEY}:
        raise PatchError("not a mosectl patch", where="__metadata__", fix="give a file made by mosectl edit")
    found = record_of(metadata[KEY], RECORD, FORMAT, "patch")
    spans = layout(entries, data_size)
    _check_shapes(spans)
    shapes = {name: span.shape for name, span in spans.items()}
    _check_fit(found, _by_module(shapes))
    return found, spans


def record_of(raw: str, check: schema.Check, newest: int, kind: str) -> dict[str, Any]:
    """The record of a patch or an editor as JSON, checked.

    Raises:
        PatchError: it is not JSON, of an unknown format, or a field is not as ``check`` asks.
    """
    try:
        found = parse_json(raw)
        version = found.get("format") if isinstance(found, dict) else None
        if type(version) is int and version != newest:
            raise PatchError(f"unknown {kind} format {version}", where="record", fix="update mosectl")
        check(found)
    except schema.Misfit as e:
        raise PatchError(
            e.what, where=f"record.{e.path}" if e.path else "record", fix="update mosectl, or fetch the file again"
        ) from e
    except ValueError as e:
        raise PatchError(f"damaged JSON: {e}", where="record", fix=f"fetch the {kind} again") from e
    return found


def _check_shapes(spans: Mapping[str, Span]) -> None:
    """Names and shapes of a patch's tensors, each for itself."""
    for name, span in spans.items():
        found = _NAME.fullmatch(name) if len(name) <= _NAME_LENGTH else None
        shape = list(span.shape)
        if not found:
            fix = "a patch holds only '<module>.R', '.U', '.Q', the same with '_in', '.A' and '.B'"
            raise PatchError(f"tensor name {name[:100]!r} is not allowed", where="header", fix=fix)
        if len(shape) != 2:
            raise PatchError(f"must be an F32 matrix, found {shape}", where=name, fix=DAMAGED)
        if found[2].startswith(("R", "Q")) and shape[0] != shape[1]:
            raise PatchError(f"a rotation must be a square F32 matrix, found {shape}", where=name, fix=DAMAGED)
        if found[2].startswith("U") and shape[1] > shape[0]:
            raise PatchError("its columns are not orthonormal: more than their length", where=name, fix=ALTERED)
    if not spans:
        raise PatchError("the patch changes nothing", fix=DAMAGED)


def _check_fit(found: Mapping[str, Any], modules: Mapping[str, Shapes]) -> None:
    """Do the record and the tensors belong together?"""
    for module, shapes in modules.items():
        if side_of(shapes) != found["side"]:
            what = f"holds {', '.join(shapes)}, which is not side '{found['side']}'"
            raise PatchError(what, where=module, fix=ALTERED)
    if set(found["base"]) != set(modules):
        raise PatchError("base tensors and changes do not match", where="record.base", fix=ALTERED)
    for module, entry in found["base"].items():
        where = f"record.base.{module}"
        if not _fits(modules[module], *entry["shape"]):
            sizes = ", ".join(f"{kind} {list(shape)}" for kind, shape in modules[module].items())
            raise PatchError(f"shape {entry['shape']} does not fit {sizes}", where=where, fix=ALTERED)
        if entry["tensor"] not in (f"{module}.weight", f"{module}.experts.0.down_proj.weight"):
            what = f"tensor {schema.shown(entry['tensor'])} does not belong to this module"
            raise PatchError(what, where=where, fix=ALTERED)


def _fits(f: Shapes, *shape: int) -> bool:
    """Do factors of these shapes fit a weight of this shape, stored as (d, p) or as (p, d)?"""
    inner = all(f[a][1] == f[b][0] for a, b in (("U", "Q"), ("U_in", "Q_in"), ("B", "A")) if a in f)
    return inner and any(
        all(f[kind][0] == d for kind in ("R", "U", "B") if kind in f)
        and all(f[kind][0] == p for kind in ("R_in", "U_in") if kind in f)
        and all(f[kind][1] == p for kind in ("A",) if kind in f)
        for d, p in (shape, shape[::-1])
    )


def _by_module(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by tensor name to values by module and kind, in the order of the layers: a file has them in any order."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(values, key=_by_layer):
        module, _, kind = name.rpartition(".")
        found.setdefault(module, {})[kind] = values[name]
    return found


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _rows_checked() -> Rows:
    """A check of what some rows tell already: those of a rotation have length 1.

    Σ (‖row‖² − 1)² over all rows is at most ‖RRᵀ − I‖_F², which is ‖RᵀR − I‖_F².
    """
    off: dict[str, float] = defaultdict(float)

    def check(name: str, rows: Tensor) -> None:
        if name.endswith((".R", ".R_in", ".Q", ".Q_in")):
            n = rows.shape[1]
            off[name] += float((rows.double().square().sum(1) - 1).square().sum())
            if off[name] > orthogonality_tolerance(n) ** 2 * n:
                raise PatchError("is not a rotation (its rows are not of length 1)", where=name, fix=ALTERED)

    return check


def _check_factor(name: str, factor: Tensor) -> None:
    """A whole tensor whose rows are as they must be."""
    if name.endswith((".A", ".B")):
        return
    if name.endswith((".U", ".U_in")):
        if orthogonality_error(factor) > orthogonality_tolerance(len(factor)):
            raise PatchError("its columns are not orthonormal", where=name, fix=ALTERED)
        return
    if is_rotation(factor):
        return
    error, limit = orthogonality_error(factor), orthogonality_tolerance(len(factor))
    why = f"‖RᵀR−I‖/√d = {error:.1e}, allowed {limit:.1e}" if error > limit else "a reflection, det R = −1"
    raise PatchError(f"is not a rotation ({why})", where=name, fix=ALTERED)
