"""An edited checkpoint folder written from its base tensors: only the shards that change, one tensor in memory at a time.

A shard is cloned (by reference where the file system can) and the changed tensors' bytes are overwritten in the clone.
Shards that an interrupted start has finished are told by a list beside them and are not written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from mosectl.change import changed, restored
from mosectl.checkpoint import JOURNAL, SIDECAR, Entry, tensor_bytes
from mosectl.errors import EditFailed, OutputError
from mosectl.files import DONE, clone, link_or_copy, output_errors, stream_tensors
from mosectl.fingerprint import sha256
from mosectl.finite import check_changed, check_weight, is_finite
from mosectl.journal import Applied, EditedTensor, Journal
from mosectl.metrics import Stability, stability
from mosectl.patch import Patch
from mosectl.source import KEPT_BASE, Source, out_of_reach

OnStep = Callable[[int, int], None]
SPECTRUM_UP_TO = 2048  # hidden size up to which a spectrum takes no longer than copying the shard


@dataclass(frozen=True)
class TensorReport:
    """What happened to one weight."""

    tensor: str
    dtype: str
    note: str  # how the base was recognised, or how far the restored weight is from it
    exact: bool  # computed from the base tensor itself
    stability: (
        Stability | None
    )  # on the stored dtype, base against result; None: restored, base unknown, or not asked for


@dataclass(frozen=True)
class ApplyReport:
    """What a rebuild wrote."""

    folder: Path
    stack: tuple[str, ...]  # patch ids now applied
    tensors: tuple[TensorReport, ...]
    bytes_written: int
    restored: bool  # no patch is left and every tensor has its original sha256
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writing:
    """How a folder is written."""

    keep_base: bool = True
    copy: bool = False  # copy unchanged weight files instead of hard-linking them
    proof: bool | None = None  # compare spectra; None: where it takes little time
    left_out: tuple[str, ...] = ()  # files of the source's folder that are not carried over


def plan_of(source: Source, stack: Sequence[Patch], how: Writing) -> str:
    """A text that is the same only for the same work: a start finds by it what an interrupted one was about."""
    shards = {str(e.file.resolve()): e.file.stat().st_mtime_ns for e in source.checkpoint.tensors.values()}
    return json.dumps([shards, source.ids, [p.id for p in stack], asdict(how)], sort_keys=True)


def rebuild(
    source: Source,
    stack: Sequence[Patch],
    folder: Path,
    final: Path,
    how: Writing,
    notes: Mapping[str, str],
    on_step: OnStep | None,
) -> ApplyReport:
    """Write the checkpoint with exactly ``stack`` applied into ``folder`` (which becomes ``final``).

    Raises:
        OutputError: no space, or no right to write. ModelError, EditFailed: as in mosectl.finite.
    """
    checkpoint = source.checkpoint
    touching = {n for p in [*source.stack, *stack] for m in p.changes for n in source.tensors_of(m)}
    names = sorted(touching, key=lambda n: (checkpoint.entry(n).file.name, checkpoint.entry(n).start))
    shards = list(dict.fromkeys(checkpoint.entry(n).file for n in names))
    reports: dict[str, TensorReport] = {}
    edited: dict[str, EditedTensor] = {}
    finished = _finished(folder)
    with output_errors(final):
        size = _check_space(source, stack, names, folder, final, how)
        _others(source, folder, {f.name for f in shards} | set(how.left_out), how.copy)
        for shard in shards:
            here = [n for n in names if checkpoint.entry(n).file == shard]
            known = finished.get(shard.name, {})
            if set(known) != set(here):
                clone(shard, folder / shard.name)
            with (folder / shard.name).open("r+b") as file:
                for name in here:
                    again = known.get(name)
                    reports[name], edited[name] = _one(source, stack, name, notes.get(name, ""), how, file, again)
                    if on_step:
                        on_step(len(reports), len(names))
                file.flush()
                os.fsync(file.fileno())
            _mark(folder, shard.name, {n: asdict(edited[n]) for n in here})
        touched = {n for p in stack for m in p.changes for n in source.tensors_of(m)}
        _records(source, stack, folder, {n: t for n, t in edited.items() if n in touched}, how.keep_base)
    place = {n: (source.projection(m).layer, i) for m, of in source.names.items() for i, n in enumerate(of)}
    ordered = sorted(reports, key=lambda n: place[n])
    exact = all(r.exact for r in reports.values())
    told = tuple(reports[n] for n in ordered)
    return ApplyReport(final, tuple(p.id for p in stack), told, size, restored=not stack and exact)


def _one(
    source: Source,
    stack: Sequence[Patch],
    name: str,
    note: str,
    how: Writing,
    file: BinaryIO,
    again: Mapping[str, str] | None,
) -> tuple[TensorReport, EditedTensor]:
    """Compute one weight and write it into its shard, unless an interrupted start has (``again``: its hashes)."""
    module = source.module_of[name]
    projection = source.projection(module)
    entry = source.checkpoint.entry(name)
    if again is not None:
        edit = EditedTensor(**again)
        return TensorReport(name, entry.dtype, "written by the start before", bool(edit.base_sha256), None), edit
    W0 = source.base_tensor(name)
    weight = weight_under(source, name, W0, stack)
    edits = [p for p in stack if module in p.changes]
    if W0 is None and not is_finite(weight):
        raise EditFailed("what is left after undoing is not finite", where=name, fix="start again from the base model")
    if edits and W0 is not None:
        check_weight(name, W0, f"{source.checkpoint.model}, {entry.file.name}")
        W = projection.oriented(W0)
        check_changed(name, W, weight, [p.changes[module] for p in edits], [p.id for p in edits])
    raw = tensor_bytes(weight, entry)
    file.seek(entry.start)
    file.write(raw)
    now = sha256(weight)
    if W0 is None:
        why = out_of_reach(source.journal) if source.journal else "the base is out of reach"
        note = note or f"{why}; undone algebraically, exact up to rounding"
    elif not edits:
        note = f"restored bit for bit, sha256 {now[:12]}"
    drift = None
    if W0 is not None and edits and (projection.d <= SPECTRUM_UP_TO if how.proof is None else how.proof):
        drift = stability(name, projection.oriented(W0), projection.oriented(weight))
    old = source.journal.tensors.get(name) if source.journal else None
    base_sha = now if weight is W0 else sha256(W0) if W0 is not None else (old.base_sha256 if old else "")
    return TensorReport(name, entry.dtype, note, W0 is not None, drift), EditedTensor(base_sha, now)


def weight_under(source: Source, name: str, W0: Tensor | None, stack: Sequence[Patch]) -> Tensor:
    """A tensor under ``stack``, in its stored orientation and dtype."""
    module = source.module_of[name]
    projection = source.projection(module)
    new = [p.changes[module] for p in stack if module in p.changes]
    if W0 is not None:
        return projection.stored(changed(new, projection.oriented(W0))).contiguous() if new else W0
    old = [p.changes[module] for p in source.stack if module in p.changes]
    W = projection.oriented(source.checkpoint.read(name))
    return projection.stored(changed(new, restored(old, W.double())).to(W.dtype)).contiguous()


def _check_space(
    source: Source, stack: Sequence[Patch], names: Sequence[str], folder: Path, final: Path, how: Writing
) -> int:
    """Bytes that will be written, or an OutputError where there is no room for them."""
    entries = [source.checkpoint.entry(n) for n in names]
    size = sum(f.stat().st_size for f in {e.file for e in entries}) + sum(
        c.nbytes for p in stack for c in p.changes.values()
    )
    size += sum(e.stop - e.start for e in entries) if how.keep_base else 0
    free = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if free < size + 2**20:
        needs = f"needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise OutputError(needs, where=str(final), fix="free some space")
    return size


def _others(source: Source, folder: Path, shards: set[str], copy: bool) -> None:
    """Every file of the checkpoint but its changed shards and mosectl's own."""
    skip = shards | {SIDECAR, JOURNAL, ".git", ".cache"}
    origin = source.checkpoint.folder
    shutil.copytree(
        origin,
        folder,
        ignore=lambda where, names: skip & set(names) if Path(where) == origin else set(),
        copy_function=lambda a, b: link_or_copy(Path(a), Path(b), copy),
        dirs_exist_ok=True,
    )


def _records(
    source: Source,
    stack: Sequence[Patch],
    folder: Path,
    edited: Mapping[str, EditedTensor],
    keep_base: bool,
) -> None:
    """The patches, the kept base tensors and the journal; nothing where no patch is left."""
    if not stack:
        return
    checkpoint, old = source.checkpoint, source.journal
    applied = []
    for patch in stack:
        file = f"{SIDECAR}/{patch.id[:16]}.safetensors"
        patch.save(folder / file)
        applied.append(Applied(patch.id, file, len(patch.facts)))
    known = [n for n, t in edited.items() if t.base_sha256 and source.base_tensor(n) is not None]
    if keep := keep_base and bool(known):
        entries: dict[str, Entry] = {n: checkpoint.entry(n) for n in known}

        def base(name: str) -> bytes:
            W0 = source.base_tensor(name)
            assert W0 is not None
            return tensor_bytes(W0, entries[name])

        stream_tensors(folder / KEPT_BASE, {n: (e.dtype, e.shape) for n, e in entries.items()}, base)
    Journal(
        model=old.model if old else checkpoint.model,
        revision=old.revision if old else checkpoint.revision,
        base_path=old.base_path if old else str(checkpoint.folder.resolve()),
        kept_base=keep,
        patches=tuple(applied),
        tensors=dict(edited),
    ).write(folder)


def _finished(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Shards that an interrupted start of the same plan has written whole, with their tensors' hashes."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    with suppress(OSError):
        for line in (folder / DONE).read_text("utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line may be cut off
                entry = json.loads(line)
                found[entry["shard"]] = entry["tensors"]
    return found


def _mark(folder: Path, shard: str, tensors: Mapping[str, Mapping[str, str]]) -> None:
    with (folder / DONE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"shard": shard, "tensors": tensors}) + "\n")
        file.flush()
        os.fsync(file.fileno())
