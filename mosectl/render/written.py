"""What apply, revert and export say of what they have written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mosectl.render.console import hint, line, size, table, warn
from mosectl.render.terminal import stability
from mosectl.text.shown import word

if TYPE_CHECKING:
    from mosectl.checkpoints.export import Exported
    from mosectl.checkpoints.writer import ApplyReport


def applied(r: ApplyReport, verb: str) -> None:
    """What was written by apply or revert."""
    table(
        f"{verb} → {r.folder}",
        ("tensor", "dtype", "exact", "base"),
        _folded([(t.tensor, t.dtype, "yes" if t.exact else "within rounding", t.note) for t in r.tensors]),
    )
    shown = [t.stability for t in r.tensors if t.stability]
    worst = {_alike(s.name): s for s in sorted(shown, key=lambda s: s.spectrum_drift)}
    if drifts := [s for s in shown if worst[_alike(s.name)] is s]:
        stability("Stability on the stored dtype", drifts)
        if rounded := sorted({t.dtype for t in r.tensors if t.stability and t.dtype not in ("F32", "F64")}):
            line(
                f"these drifts include rounding the changed weights to {', '.join(rounded)}; those that edit shows do not"
            )
    for warning in r.warnings:
        warn("warning", f" {warning}")
    if r.restored:
        line(f"edited tensors that have their original sha256 again: all {len(r.tensors)}")
    line(
        f"{r.folder}: {len(r.stack)} patch{'' if len(r.stack) == 1 else 'es'} applied, {size(r.bytes_written)} written"
    )


def after_applying(folder: Path, patch: str) -> None:
    """What can be done with an edited folder."""
    of = word(folder)
    hint(
        f"next: mosectl ask PROMPT --model {of}   |   mosectl log {of}   |   mosectl revert {word(patch)} --model {of}"
    )


def _alike(tensor: str) -> str:
    """A tensor's name without the number of the expert: the experts of a layer share a line."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", tensor)


def _folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows with all but the first expert of a layer as one row."""
    out: dict[tuple[str, ...], int] = {}
    for name, *rest in rows:
        key = (name if ".experts.0." in name else _alike(name), *rest)
        out[key] = out.get(key, 0) + 1
    return [(f"{name} ({n})" if n > 1 else name, *rest) for (name, *rest), n in out.items()]


def exported(e: Exported) -> None:
    """What was written for serving."""
    if e.form == "merged":
        line(f"{e.path}: a checkpoint with {len(e.modules)} changed weights")
        return
    full = "exact" if e.dtype == "float32" else f"exact but for the rounding to {e.dtype}"
    how_much = full if e.exact else f"{e.left_out:.1%} of the change left out"
    line(f"{e.path}: a LoRA of rank {e.rank} for {len(e.modules)} weights, {how_much}")
    if e.smaller:
        cuts = (
            f"--rank {k} would leave {max(share, 0.001):.1%}{' or less' * (share < 0.001)} out"
            for k, share in e.smaller
        )
        hint(f"smaller: {', '.join(cuts)}")
    if e.form == "lora":
        hint(
            f"next: PeftModel.from_pretrained(model, {str(e.path)!r})   |   vllm serve MODEL --enable-lora "
            f"--max-lora-rank {e.rank} --lora-modules edited={word(e.path)}"
        )
    if e.modelfile:
        line(f"{e.modelfile}: for Ollama (ollama create NAME -f {e.modelfile.name})")
