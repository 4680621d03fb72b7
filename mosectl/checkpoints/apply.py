"""apply and revert on a checkpoint folder: one way, `rebuild`, computes any stack of patches from the base tensors.

W is rounded once from the base, however many patches there are, and undoing is leaving a patch out of the product. Only
when the base tensors are gone is a patch undone algebraically (Rᵀ, or − B A), which is exact up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mosectl.checkpoints.base import Source
from mosectl.checkpoints.writer import ApplyReport, Writing, plan_of, rebuild, weight_under
from mosectl.errors import BaseMismatch, ModelError, Notice, OutputError, PatchError
from mosectl.model.readiness import check_weights
from mosectl.patch.change import restored
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import distance, match
from mosectl.storage.checkpoint import JOURNAL, Checkpoint, open_checkpoint, twins
from mosectl.storage.folders import built, claimed, recovered
from mosectl.storage.gguf_header import is_gguf
from mosectl.text.shown import word

OnStep = Callable[[int, int], None]


def apply(
    patches: Sequence[Patch],
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    keep_base: bool = True,
    copy: bool = False,
    proof: bool | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> ApplyReport:
    """Write ``model`` with ``patches`` on top (and on top of those it already has) to the new folder ``out``.

    Args:
        keep_base: store the original tensors in ``out/mosectl/base.safetensors`` so that revert is always bit for bit.
        copy: copy unchanged weight files instead of hard-linking them.
        proof: compare the spectra before and after; None: where it takes little time (hidden size up to 2048).
        force: skip the check that each patch was made for this base.
    Raises:
        BaseMismatch: a patch was made for another base. ModelError: among others, a weight that is not finite, or all zeros.
        EditFailed: a changed weight would not be finite. HubError. OutputError: no space, no right to write, or another
        process is writing there.
    """
    with claimed(Path(out)):
        source = Source(open_checkpoint(model, revision), base)
        check_weights(source.checkpoint)
        _check_new(source, patches)
        stack = [*source.stack, *patches]
        if not force:
            _check_intact(source)
        notes = {} if force else _check_bases(source, patches)
        left_out = tuple(twins(source.checkpoint))
        if file := source.checkpoint.gguf:
            what = f"{out} is a checkpoint of float32 weights, no GGUF file; for llama.cpp, export --to gguf-lora gives"
            warnings.warn(f"{what} an adapter for {file.file.name}", Notice, stacklevel=2)
        if left_out:
            what = f"not copied to {out}, they hold the unedited weights for other programs: {', '.join(left_out)}"
            warnings.warn(what, Notice, stacklevel=2)
        return _written(source, stack, Path(out), Writing(keep_base, copy, proof, left_out), notes, on_step)


def _written(
    source: Source, stack: Sequence[Patch], out: Path, how: Writing, notes: dict[str, str], on_step: OnStep | None
) -> ApplyReport:
    """The rebuilt folder, in its place; ``out`` is claimed."""
    plan = plan_of(source, stack, how)
    with built(out, replace=how.in_place, plan=plan, rights=source.checkpoint.folder) as folder:
        done = rebuild(source, stack, folder, out, how, notes, on_step)
        if plan_of(source, stack, how) != plan:
            raise ModelError("was changed while it was read", where=source.checkpoint.model, fix="try again")
    return done


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
        PatchError: the patch is not in the folder's stack. ModelError: the journal does not name just the tensors that the
        stored patches edit. BaseMismatch: nor the base they were made for. EditFailed, OutputError.
    """
    if out is None:
        recovered(Path(model))  # before it is asked whether it is there
        if is_gguf(Path(model)):
            fix = "serve it without the adapter; only a folder that apply has written can be reverted"
            raise ModelError("is a GGUF file: no patch is applied to it", where=str(model), fix=fix)
        if not Path(model).is_dir():
            open_checkpoint(model)
            raise OutputError("a hub model cannot be reverted in place", where=str(model), fix="give -o")
    target = Path(model).resolve() if out is None else Path(out)
    with claimed(target, replace=out is None):
        return _reverted(patch, open_checkpoint(model), target, out is None, base, force, on_step)


def _reverted(
    patch: Patch | str,
    checkpoint: Checkpoint,
    target: Path,
    in_place: bool,
    base: str | Path | None,
    force: bool,
    on_step: OnStep | None,
) -> ApplyReport:
    source, where = Source(checkpoint, base), str(checkpoint.folder)
    if source.journal is None:
        if isinstance(patch, str):
            raise ModelError(f"no {JOURNAL}: no patch is applied here", where=where, fix="give the patch file")
        source = Source(checkpoint, base, unrecorded=patch)
        notes = _check_unrecorded(source, patch, force)
        wanted = patch.id
    else:
        notes = {}
        if not force:
            check_stored(source)
        wanted = _find(patch if isinstance(patch, str) else patch.id, source.ids, where)
    if not force:
        _check_intact(source)
    stack = [p for p in source.stack if p.id != wanted]
    changed = source.unedited_but_changed() if source.journal else []
    how = Writing(keep_base=source.journal is not None and source.journal.kept_base, in_place=in_place)
    done = _written(source, stack, target, how, notes, on_step)
    warnings = [
        f"patch {p.id[:12]} was computed on top of it and may act differently now" for p in stack if wanted in p.parents
    ]
    if changed:
        some = ", ".join(changed[:3])
        warnings.append(f"{len(changed)} other tensors are not the base's, no patch made them so: {some}")
    if how.keep_base and not all(t.exact for t in done.tensors):
        lost = f"the kept base tensors are damaged, {source.out_of_reach}"
        warnings.append(f"{lost}; undone algebraically, exact up to rounding")
    return replace(done, warnings=tuple(warnings))


def replayed(source: Source) -> dict[str, Tensor | None]:
    """What an edited folder's patches make of its base, by tensor name; None where the base is out of reach."""
    out: dict[str, Tensor | None] = {}
    for name in dict.fromkeys(n for p in source.stack for m in p.changes for n in source.tensors_of(m)):
        W0 = source.base_tensor(name)
        out[name] = weight_under(source, name, W0, source.stack) if W0 is not None else None
    return out


def check_stack(checkpoint: Checkpoint, patches: Sequence[Patch]) -> None:
    """Would :func:`apply` take these patches, in this order, on this checkpoint?

    Raises:
        PatchError: one is given twice or already applied. BaseMismatch: one was made for another base.
    """
    source = Source(checkpoint, None)
    _check_new(source, patches)
    _check_bases(source, patches)


def check_stored(source: Source) -> None:
    """Refuse an edited folder whose journal has another base than its own patches were made for.

    Raises:
        BaseMismatch.
    """
    if found := source.mismatches():
        name, why = found[0]
        fix = "start again from the base model; --force where it was applied with --force"
        raise BaseMismatch(why, where=f"{source.checkpoint.folder}: {name}", fix=fix)


def _check_intact(source: Source) -> None:
    """Refuse to overwrite what something else has changed since."""
    if changed := source.edited_and_changed():
        what = f"'{changed[0]}' was changed after mosectl wrote it, and would be overwritten"
        raise ModelError(what, where=source.checkpoint.model, fix="see mosectl verify; --force overwrites it")


def _check_new(source: Source, patches: Sequence[Patch]) -> None:
    """Refuse a patch that is there already, or given twice."""
    for i, patch in enumerate(patches):
        if patch.id in source.ids:
            where, what = source.checkpoint.model, f"patch {patch.id[:12]} is already applied"
            raise PatchError(what, where=where, fix=f"see mosectl log {word(source.checkpoint.folder)}")
        if patch.id in [p.id for p in patches[:i]]:
            raise PatchError(f"patch {patch.id[:12]} is given twice", fix="leave one of the two out")


def _check_bases(source: Source, patches: Sequence[Patch]) -> dict[str, str]:
    """Refuse a patch made for other weights; otherwise say per tensor how the base was recognised."""
    check_stored(source)
    notes: dict[str, str] = {}
    before = list(source.ids)
    for patch in patches:
        for module, made_for in patch.base.items():
            name, *others = source.tensors_of(module)
            if patch.parents:
                if list(patch.parents) != before:
                    needed = ", ".join(p[:12] for p in patch.parents)
                    raise BaseMismatch(
                        f"patch {patch.id[:12]} was computed on top of {needed}, which is not the stack here",
                        where=source.checkpoint.model,
                        fix="apply those first, in that order",
                    )
                notes |= dict.fromkeys((name, *others), "on top of the patches it was computed on")
                continue
            weight = source.base_tensor(name)
            if weight is None:
                raise BaseMismatch(source.out_of_reach, where=name, fix="give --base, or --force to skip")
            found = match(made_for, weight)
            if not found.same:
                force = ", or --force to skip this check" if found.fits else ""
                raise BaseMismatch(
                    f"patch {patch.id[:12]} is for {patch.model}: {found.note}",
                    where=f"{source.checkpoint.model}: {name}",
                    fix=f"give the model it was made for ({patch.model}){force}",
                )
            notes |= {name: found.note, **dict.fromkeys(others, "known by the first expert")}
        before.append(patch.id)
    return notes


def _check_unrecorded(source: Source, patch: Patch, force: bool) -> dict[str, str]:
    """Without a journal: undoing the patch must lead to what looks like its base before we believe it was applied."""
    notes: dict[str, str] = {}
    for module, made_for in patch.base.items():
        projection, (name, *others) = source.projection(module), source.tensors_of(module)
        W = source.checkpoint.read(name)
        if match(made_for, W).same:
            where = source.checkpoint.model
            raise PatchError(f"patch {patch.id[:12]} is not applied here", where=where, fix="nothing to revert")
        undone = projection.stored(restored([patch.changes[module]], projection.oriented(W)))
        error = distance(made_for, undone)
        if not error <= 0.05 and not force:  # NaN too
            raise BaseMismatch(
                f"undoing the patch leads {error:.0%} away from its base", where=name, fix="is it applied here? --force"
            )
        notes[name] = f"undone algebraically, {error:.1e} from the base (64 sampled entries, relative to their size)"
        notes |= dict.fromkeys(others, "undone algebraically, known by the first expert")
    return notes


def _find(wanted: str, ids: Sequence[str], where: str) -> str:
    found = [i for i in ids if i.startswith(wanted)] if len(wanted) >= 6 else []
    if len(found) > 1:
        raise PatchError(f"{len(found)} patches begin with {wanted}", where=where, fix="give more digits of the id")
    if not found:
        have = ", ".join(i[:12] for i in ids) or "none"
        raise PatchError(f"patch {wanted[:12]} is not applied here", where=where, fix=f"applied are: {have}")
    return found[0]
