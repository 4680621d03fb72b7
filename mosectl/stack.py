"""apply and revert on a checkpoint folder: one way, `_rebuild`, computes any stack of patches from the base tensors.

W is rounded once from the base, however many patches there are, and undoing is leaving a patch out of the product. Only
when the base tensors are gone is a patch undone algebraically (Rᵀ, or − B A), which is exact up to rounding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mosectl.arch import Architecture, Projection, disk_names, resolve, skeleton
from mosectl.change import changed, restored
from mosectl.checkpoint import JOURNAL, SIDECAR, Checkpoint, open_checkpoint, write_shard
from mosectl.errors import BaseMismatch, HubError, ModelError, OutputError, PatchError
from mosectl.files import link_or_copy, new_folder, output_errors, write_tensors
from mosectl.fingerprint import distance, match, sha256
from mosectl.journal import Applied, EditedTensor, Journal, read_journal
from mosectl.metrics import Stability, stability
from mosectl.patch import Patch

KEPT_BASE = f"{SIDECAR}/base.safetensors"
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorReport:
    """What happened to one weight."""

    tensor: str
    dtype: str
    note: str  # how the base was recognised, or how far the restored weight is from it
    exact: bool  # computed from the base tensor itself
    stability: Stability | None  # on the stored dtype, base against result; None when restored or base unknown


@dataclass(frozen=True)
class ApplyReport:
    """What a rebuild wrote."""

    folder: Path
    stack: tuple[str, ...]  # patch ids now applied
    tensors: tuple[TensorReport, ...]
    bytes_written: int
    restored: bool  # no patch is left and every tensor has its original sha256
    warnings: tuple[str, ...] = ()


def apply(
    patches: Sequence[Patch],
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    keep_base: bool = True,
    force: bool = False,
    on_step: OnStep | None = None,
) -> ApplyReport:
    """Write ``model`` with ``patches`` on top (and on top of those it already has) to the new folder ``out``.

    Args:
        keep_base: store the original tensors in ``out/mosectl/base.safetensors`` so that revert is always bit for bit.
        force: skip the check that each patch was made for this base.
    Raises:
        BaseMismatch: a patch was made for another base. ModelError, OutputError, HubError.
    """
    source = _Source(open_checkpoint(model, revision), base)
    _check_new(source, patches)
    stack = [*source.stack, *patches]
    notes = {} if force else _check_bases(source, patches)
    with new_folder(Path(out)) as folder:
        return _rebuild(source, stack, folder, Path(out), keep_base, notes, on_step)


def revert(
    patch: Patch | str,
    model: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> ApplyReport:
    """Take one patch out of an edited folder: in place (``out`` None, exchanged in one step) or into a new folder.

    Args:
        patch: the patch, or the beginning of its id (at least 6 digits).
        base: where the unedited model is, if the edited folder has not kept its base tensors.
        force: undo algebraically although the result is not recognised as the patch's base.
    Raises:
        PatchError: the patch is not in the folder's stack. ModelError, BaseMismatch, OutputError.
    """
    checkpoint = open_checkpoint(model)
    if out is None and not Path(model).is_dir():
        raise OutputError("a hub model cannot be reverted in place", where=str(model), fix="give -o")
    source = _Source(checkpoint, base)
    if source.journal is None:
        if isinstance(patch, str):
            raise ModelError(f"no {JOURNAL}: nothing was applied here", where=str(model), fix="give the patch file")
        source = _Source(checkpoint, base, unrecorded=patch)
        notes = _check_unrecorded(source, patch, force)
        wanted = patch.id
    else:
        notes = {}
        wanted = _find(patch if isinstance(patch, str) else patch.id, source.ids, str(model))
    stack = [p for p in source.stack if p.id != wanted]
    target = Path(model).resolve() if out is None else Path(out)
    with new_folder(target, replace=out is None) as folder:
        keep = source.journal is not None and source.journal.kept_base
        done = _rebuild(source, stack, folder, target, keep, notes, on_step)
    orphans = (
        f"patch {p.id[:12]} was computed on top of it and may act differently now" for p in stack if wanted in p.parents
    )
    return replace(done, warnings=tuple(orphans))


def replayed(checkpoint: Checkpoint, base: str | Path | None = None) -> dict[str, Tensor | None]:
    """What an edited folder's patches make of its base, by tensor name; None where the base is out of reach."""
    source = _Source(checkpoint, base)
    out: dict[str, Tensor | None] = {}
    for module in dict.fromkeys(m for p in source.stack for m in p.changes):
        W0 = source.base_tensor(module)
        out[source.disk_name(module)] = _weight(source, module, W0, source.stack) if W0 is not None else None
    return out


def check_stack(checkpoint: Checkpoint, patches: Sequence[Patch]) -> None:
    """Would :func:`apply` take these patches, in this order, on this checkpoint?

    Raises:
        PatchError: one is given twice or already applied. BaseMismatch: one was made for another base.
    """
    source = _Source(checkpoint, None)
    _check_new(source, patches)
    _check_bases(source, patches)


class _Source:
    """A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors."""

    def __init__(self, checkpoint: Checkpoint, base: str | Path | None, unrecorded: Patch | None = None) -> None:
        self.checkpoint = checkpoint
        self.journal = read_journal(checkpoint.folder)
        self.arch: Architecture = resolve(skeleton(checkpoint.config))
        self.names = disk_names(self.arch, checkpoint.tensors)
        self.projections = {p.name: p for p in self.arch.projections}
        self.stack = [unrecorded] if unrecorded else [self._stored_patch(a) for a in self._applied]
        self.unrecorded = unrecorded is not None
        self.base_path = base
        self._other: Checkpoint | bool | None = False  # not looked for yet

    @property
    def _applied(self) -> Sequence[Applied]:
        return self.journal.patches if self.journal else ()

    @property
    def ids(self) -> list[str]:
        return [p.id for p in self.stack]

    def _stored_patch(self, applied: Applied) -> Patch:
        patch = Patch.load(self.checkpoint.folder / applied.file)
        if patch.id != applied.id:
            raise PatchError("not the patch the journal names", where=applied.file, fix="start again from the base")
        return patch

    def projection(self, module: str) -> Projection:
        if module not in self.projections:
            raise BaseMismatch(
                f"no module '{module}' in this {self.arch.model_type} model ({len(self.projections)} layers)",
                where=self.checkpoint.model,
                fix="give the model the patch was made for",
            )
        return self.projections[module]

    def disk_name(self, module: str) -> str:
        return self.names[self.projection(module).name]

    def base_tensor(self, module: str) -> Tensor | None:
        """The weight as it was before any patch, checked by hash; None when it is out of reach."""
        name = self.disk_name(module)
        if self.unrecorded:
            given = open_checkpoint(self.base_path).read(name) if self.base_path else None
            return given if given is not None and match(self.stack[0].base[module], given).same else None
        edited = self.journal.tensors.get(name) if self.journal else None
        if edited is None:  # no patch has touched it
            return self.checkpoint.read(name)
        return next((t for t in self._candidates(name) if sha256(t) == edited.base_sha256), None)

    def _candidates(self, name: str) -> Iterator[Tensor]:
        kept = self.checkpoint.folder / KEPT_BASE
        if kept.is_file():
            with safe_open(kept, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  (not a dict)
                    yield file.get_tensor(name)
        if self._other is False:
            self._other = self._find_base()
        if isinstance(self._other, Checkpoint) and name in self._other.tensors:
            yield self._other.read(name)

    def _find_base(self) -> Checkpoint | None:
        assert self.journal is not None
        if self.base_path:
            return open_checkpoint(self.base_path)
        for place, revision in self.journal.places:
            with suppress(ModelError, HubError):
                return open_checkpoint(place, revision)
        return None


def _check_new(source: _Source, patches: Sequence[Patch]) -> None:
    """Refuse a patch that is there already, or given twice."""
    for i, patch in enumerate(patches):
        if patch.id in source.ids:
            where, what = source.checkpoint.model, f"patch {patch.id[:12]} is already applied"
            raise PatchError(what, where=where, fix="see mosectl.json there")
        if patch.id in [p.id for p in patches[:i]]:
            raise PatchError(f"patch {patch.id[:12]} is given twice", fix="leave one of the two out")


def _check_bases(source: _Source, patches: Sequence[Patch]) -> dict[str, str]:
    """Refuse a patch made for other weights; otherwise say per tensor how the base was recognised."""
    notes: dict[str, str] = {}
    before = list(source.ids)
    for patch in patches:
        for module, made_for in patch.base.items():
            name = source.disk_name(module)
            if patch.parents:
                if list(patch.parents) != before:
                    needed = ", ".join(p[:12] for p in patch.parents)
                    raise BaseMismatch(
                        f"patch {patch.id[:12]} was computed on top of {needed}, which is not the stack here",
                        where=source.checkpoint.model,
                        fix="apply those first, in that order",
                    )
                notes[name] = "on top of the patches it was computed on"
                continue
            weight = source.base_tensor(module)
            if weight is None:
                raise BaseMismatch(f"the base of '{name}' is out of reach", fix="give --base, or --force to skip")
            found = match(made_for, weight)
            if not found.same:
                raise BaseMismatch(
                    f"patch {patch.id[:12]} is for {patch.model}: {found.note}",
                    where=f"{source.checkpoint.model}: {name}",
                    fix=f"give the model it was made for ({patch.model}), or --force to skip this check",
                )
            notes[name] = found.note
        before.append(patch.id)
    return notes


def _check_unrecorded(source: _Source, patch: Patch, force: bool) -> dict[str, str]:
    """Without a journal: undoing the patch must lead to what looks like its base before we believe it was applied."""
    notes: dict[str, str] = {}
    for module, made_for in patch.base.items():
        projection, name = source.projection(module), source.disk_name(module)
        W = source.checkpoint.read(name)
        if match(made_for, W).same:
            raise BaseMismatch("this patch is not applied here", where=name, fix="nothing to revert")
        undone = projection.stored(restored([patch.changes[module]], projection.oriented(W)))
        error = distance(made_for, undone)
        if error > 0.05 and not force:
            raise BaseMismatch(
                f"undoing the patch leads {error:.0%} away from its base", where=name, fix="is it applied here? --force"
            )
        notes[name] = f"undone algebraically, {error:.1e} from the base (64 sampled entries, relative to their size)"
    return notes


def _find(wanted: str, ids: Sequence[str], where: str) -> str:
    found = [i for i in ids if i.startswith(wanted)] if len(wanted) >= 6 else []
    if len(found) != 1:
        have = ", ".join(i[:12] for i in ids) or "none"
        raise PatchError(f"patch {wanted[:12]} is not applied here", where=where, fix=f"applied are: {have}")
    return found[0]


def _rebuild(
    source: _Source,
    stack: Sequence[Patch],
    folder: Path,
    final: Path,
    keep_base: bool,
    notes: Mapping[str, str],
    on_step: OnStep | None,
) -> ApplyReport:
    """Write the checkpoint with exactly ``stack`` applied into ``folder`` (which becomes ``final``)."""
    modules = sorted({m for p in [*source.stack, *stack] for m in p.changes}, key=lambda m: source.projection(m).layer)
    reports: list[TensorReport] = []
    weights: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    edited: dict[str, EditedTensor] = {}
    for done, module in enumerate(modules):
        name = source.disk_name(module)
        W0 = source.base_tensor(module)
        weight = _weight(source, module, W0, stack)
        edits = any(module in p.changes for p in stack)
        report = _report(source, module, W0, weight, edits, notes.get(name, ""))
        reports.append(report)
        weights[name] = weight
        if edits:
            old = source.journal.tensors.get(name) if source.journal else None
            base_sha = sha256(W0) if W0 is not None else (old.base_sha256 if old else "")
            edited[name] = EditedTensor(base_sha, sha256(weight))
            if W0 is not None:
                bases[name] = W0
        if on_step:
            on_step(done + 1, len(modules))
    written = _write(source, stack, folder, final, weights, bases if keep_base else {}, edited)
    exact = all(r.exact for r in reports)
    return ApplyReport(final, tuple(p.id for p in stack), tuple(reports), written, restored=not stack and exact)


def _weight(source: _Source, module: str, W0: Tensor | None, stack: Sequence[Patch]) -> Tensor:
    """The module's weight under ``stack``, in its stored orientation and dtype."""
    projection = source.projection(module)
    new = [p.changes[module] for p in stack if module in p.changes]
    if W0 is not None:
        return projection.stored(changed(new, projection.oriented(W0))).contiguous() if new else W0
    old = [p.changes[module] for p in source.stack if module in p.changes]
    while old and new and old[0] is new[0]:  # what lies under the patch that is taken out stays
        old, new = old[1:], new[1:]
    W = projection.oriented(source.checkpoint.read(source.disk_name(module)))
    return projection.stored(changed(new, restored(old, W.double())).to(W.dtype)).contiguous()


def _report(source: _Source, module: str, W0: Tensor | None, weight: Tensor, edits: bool, note: str) -> TensorReport:
    projection, name = source.projection(module), source.disk_name(module)
    dtype = source.checkpoint.entry(name).dtype
    if W0 is None:
        note = note or "the base is out of reach: undone algebraically, exact up to rounding"
    elif not edits:
        note = f"restored bit for bit, sha256 {sha256(weight)[:12]}"
    drift = None
    if W0 is not None and edits:
        drift = stability(name, projection.oriented(W0), projection.oriented(weight))
    return TensorReport(name, dtype, note, W0 is not None, drift)


def _write(
    source: _Source,
    stack: Sequence[Patch],
    folder: Path,
    final: Path,
    weights: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    edited: Mapping[str, EditedTensor],
) -> int:
    """All files of the new folder: changed shards, links to the rest, patches, kept base tensors, journal."""
    checkpoint = source.checkpoint
    shards = {checkpoint.entry(name).file for name in weights}
    size = sum(f.stat().st_size for f in shards) + sum(t.nbytes for t in bases.values())
    size += sum(c.nbytes for p in stack for c in p.changes.values())
    with output_errors(final):
        free = shutil.disk_usage(folder).free
        if free < size + 2**20:
            raise OutputError(
                f"needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=str(final), fix="free some space"
            )
        skip = {f.name for f in shards} | {SIDECAR, JOURNAL, ".git", ".cache"}
        shutil.copytree(
            checkpoint.folder,
            folder,
            ignore=lambda where, names: skip & set(names) if Path(where) == checkpoint.folder else set(),
            copy_function=lambda a, b: link_or_copy(Path(a), Path(b)),
            dirs_exist_ok=True,
        )
        for shard in shards:
            changes = {n: (checkpoint.entry(n), t) for n, t in weights.items() if checkpoint.entry(n).file == shard}
            write_shard(shard, folder / shard.name, changes)
        applied = []
        for patch in stack:
            file = f"{SIDECAR}/{patch.id[:16]}.safetensors"
            patch.save(folder / file)
            applied.append(Applied(patch.id, file, len(patch.facts)))
        if bases and stack:
            write_tensors(folder / KEPT_BASE, bases)
        if stack:
            old = source.journal
            Journal(
                model=old.model if old else checkpoint.model,
                revision=old.revision if old else checkpoint.revision,
                base_path=old.base_path if old else str(checkpoint.folder.resolve()),
                kept_base=bool(bases),
                patches=tuple(applied),
                tensors=dict(edited),
            ).write(folder)
    return size
