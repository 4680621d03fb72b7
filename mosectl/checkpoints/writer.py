"""An edited checkpoint folder written from its base tensors: only the shards that change, one tensor in memory at a time.

A shard is cloned (by reference where the file system can) and the changed tensors' bytes are overwritten in the clone.
Shards that an interrupted start has finished are told by a list beside them and are not written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from mosectl.checkpoints.base import Source
from mosectl.checkpoints.base_tensors import KEPT_BASE
from mosectl.checkpoints.journal import Applied, EditedTensor, Journal
from mosectl.errors import EditFailed, ModelError, PatchError
from mosectl.linalg.spectrum import Stability, stability
from mosectl.patch.change import changed, restored
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import sha256
from mosectl.patch.finite import check_changed, check_weight, is_finite
from mosectl.storage.atomic import append, like, output_errors, stream_tensors
from mosectl.storage.checkpoint import JOURNAL, SIDECAR, Entry, tensor_bytes
from mosectl.storage.folders import carried, clone, finished, followed, linked
from mosectl.storage.places import OWN, check_room

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
    in_place: bool = (
        False  # the folder takes its source's place: it gets all that is not mosectl's, and the same rights
    )


def plan_of(source: Source, stack: Sequence[Patch], how: Writing) -> str:
    """A text that is the same only for the same work: a start finds by it what an interrupted one was about."""
    shards = {}
    for file in {e.file for e in source.checkpoint.tensors.values()}:
        status = file.stat()
        shards[str(file.resolve())] = [status.st_ino, status.st_size, status.st_mtime_ns]
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
    _check_links(source)
    touching = {n for p in [*source.stack, *stack] for m in p.changes for n in source.tensors_of(m)}
    names = sorted(touching, key=lambda n: (checkpoint.entry(n).file.name, checkpoint.entry(n).start))
    shards = {f: [n for n in names if checkpoint.entry(n).file == f] for f in (checkpoint.entry(n).file for n in names)}
    reports: dict[str, TensorReport] = {}
    edited: dict[str, EditedTensor] = {}
    done = _finished(source, folder, shards)
    with output_errors(final):
        skip = {f.name for f in shards} | {SIDECAR, JOURNAL, ".git", ".cache", *how.left_out}
        copies = [] if how.in_place else linked(checkpoint.folder, folder, skip, how.copy)
        size = _check_space(source, stack, [f for f in shards if f not in done], names, copies, folder, final, how)
        for original, copy in copies:
            clone(original, copy)
        for shard, here in shards.items():
            known = done.get(shard, {})
            if not known:
                clone(shard, folder / shard.name)
            with (folder / shard.name).open("r+b") as file:
                for name in here:
                    again = known.get(name)
                    reports[name], edited[name] = _one(source, stack, name, notes.get(name, ""), how, file, again)
                    if on_step:
                        on_step(len(reports), len(names))
                file.flush()
                os.fsync(file.fileno())
            _mark(folder, shard.name, {n: edited[n] for n in here})
        touched = {n for p in stack for m in p.changes for n in source.tensors_of(m)}
        _records(source, stack, folder, {n: t for n, t in edited.items() if n in touched}, how.keep_base)
        _rights(source, folder, list(shards), how)
        if how.in_place:
            _carry(source, folder, {f.name for f in shards})
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
        note = note or f"{source.out_of_reach}; undone algebraically, exact up to rounding"
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
    source: Source,
    stack: Sequence[Patch],
    shards: Sequence[Path],
    names: Sequence[str],
    copies: Sequence[tuple[Path, Path]],
    folder: Path,
    final: Path,
    how: Writing,
) -> int:
    """Bytes that will be written (but for the small files), or an OutputError where there is no room for them."""
    entries = [source.checkpoint.entry(n) for n in names]
    size = sum(f.stat().st_size for f in shards) + sum(c.nbytes for p in stack for c in p.changes.values())
    size += sum(e.stop - e.start for e in entries) if how.keep_base else 0
    others = sum(original.stat().st_size for original, _ in copies)
    check_room(folder, size + others, final)
    return size + sum(original.stat().st_size for original, _ in copies if original.suffix == ".safetensors")


def _check_links(source: Source) -> None:
    """Refuse a model whose weights or configuration are links out of it: whatever they lead to would be copied.

    Raises:
        ModelError.
    """
    origin = source.checkpoint.folder
    for file in {origin / "config.json", *(e.file for e in source.checkpoint.tensors.values())}:
        if file.is_symlink() and followed(file, origin) is None:
            fix = "give the folder it leads to, or make one with its links followed: cp -rL"
            raise ModelError("is a link that leads out of the model's folder", where=str(file), fix=fix)


def _rights(source: Source, folder: Path, shards: Sequence[Path], how: Writing) -> None:
    """In place, what is new has the owner, attributes and mode of what it replaces; private weights have private records."""
    origin = source.checkpoint.folder
    if how.in_place:
        old_files = {a.id: a.file for a in source.journal.patches} if source.journal else {}
        pairs = {s.name: s.name for s in shards} | {JOURNAL: JOURNAL, KEPT_BASE: KEPT_BASE, SIDECAR: SIDECAR}
        pairs |= {patch_file(id): file for id, file in old_files.items()}
        for new, old in pairs.items():
            if (folder / new).exists() and (origin / old).exists():
                like(origin / old, folder / new)
    elif shards and (folder / JOURNAL).exists():
        mode = stat.S_IMODE((folder / shards[0].name).stat().st_mode)
        for file in (folder / JOURNAL, *(folder / SIDECAR).iterdir()):
            file.chmod(mode)


def _carry(source: Source, folder: Path, shards: set[str]) -> None:
    """Everything in the source's folder but the changed shards, and what of mosectl.json and mosectl/ the journal names."""
    replaced = set(shards)
    if source.journal:
        replaced |= {JOURNAL, KEPT_BASE, *(a.file for a in source.journal.patches if a.file.startswith(f"{SIDECAR}/"))}
    carried(
        source.checkpoint.folder,
        folder,
        lambda at: str(at) in replaced or (at.parts[0] == SIDECAR and OWN.fullmatch(at.name) is not None),
    )
    if (folder / SIDECAR).is_dir() and not any((folder / SIDECAR).iterdir()):
        (folder / SIDECAR).rmdir()


def patch_file(id: str) -> str:
    """Where an edited folder keeps a patch: under its whole id, which no other patch has."""
    return f"{SIDECAR}/{id}.safetensors"


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
        file = patch_file(patch.id)
        patch.save(folder / file)
        applied.append(Applied(patch.id, file, len(patch.facts)))
    for a in applied:
        if Patch.load(folder / a.file).id != a.id:
            raise PatchError("is not what was written there a moment ago", where=a.file, fix="check the disk")
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
        base_path=old.base_path if old else str(checkpoint.origin),
        kept_base=keep,
        patches=tuple(applied),
        tensors=dict(edited),
    ).write(folder)


def _finished(
    source: Source, folder: Path, shards: Mapping[Path, Sequence[str]]
) -> dict[Path, dict[str, dict[str, str]]]:
    """Shards that an interrupted start of the same plan has written whole, with their tensors' hashes."""
    listed: dict[str, dict[str, dict[str, str]]] = {}
    with suppress(OSError):
        for line in finished(folder).read_text("utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line may be cut off
                entry = json.loads(line)
                listed[entry["shard"]] = entry["tensors"]
    found = {}
    for shard, names in shards.items():
        known = listed.get(shard.name, {})
        if set(known) == set(names) and _as_written(source, shard, folder / shard.name, known):
            found[shard] = known
    return found


def _as_written(source: Source, shard: Path, made: Path, known: Mapping[str, Mapping[str, str]]) -> bool:
    """Is ``made`` the shard with just these tensors changed, each as its hash says?"""
    parts = sorted((source.checkpoint.entry(n).start, source.checkpoint.entry(n).stop, n) for n in known)
    if not made.is_file() or made.stat().st_size != shard.stat().st_size:
        return False
    with shard.open("rb") as a, made.open("rb") as b:
        at = 0
        for start, stop, name in [*parts, (shard.stat().st_size, 0, "")]:
            while at < start:
                step = min(start - at, 2**24)
                if a.read(step) != b.read(step):
                    return False
                at += step
            if name:
                if hashlib.sha256(b.read(stop - start)).hexdigest() != known[name].get("sha256"):
                    return False
                a.seek(stop)
                at = stop
    return True


def _mark(folder: Path, shard: str, tensors: Mapping[str, EditedTensor]) -> None:
    line = json.dumps({"shard": shard, "tensors": {n: asdict(t) for n, t in tensors.items()}})
    append(finished(folder), line.encode() + b"\n")
