"""A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from mosectl.checkpoints.base_tensors import BaseTensors, out_of_reach, same_bytes
from mosectl.checkpoints.journal import Applied, Journal, read_journal
from mosectl.errors import BaseMismatch, ModelError, PatchError
from mosectl.model.architecture import Architecture, disk_names, resolve, skeleton
from mosectl.model.edit_site import Projection
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import match, sha256
from mosectl.patch.record import BaseTensor
from mosectl.storage.checkpoint import JOURNAL, Checkpoint, open_checkpoint


def layout(
    checkpoint: Checkpoint, meta_model: nn.Module | None = None
) -> tuple[Architecture, dict[str, tuple[str, ...]]]:
    """A checkpoint's layers, and the names on disk of each one's tensors, whose shapes are as config.json says.

    Args:
        meta_model: its skeleton, where there is one.
    Raises:
        ModelError: config.json claims more than the weight files hold or another shape, or the model is not supported;
        quantised weights among that.
    """
    if meta_model is None:
        meta_model = skeleton(checkpoint.config, len(checkpoint.tensors))
    arch = resolve(meta_model, str(checkpoint.folder))
    names = disk_names(arch, checkpoint.tensors)
    for p in arch.projections:
        entry = checkpoint.tensors[names[p.name][0]]
        if not p.fits(entry.shape):
            what = f"has the shape {list(entry.shape)}, its config.json says {list(p.stored_shape)}"
            where = f"{entry.file}: {names[p.name][0]}"
            raise ModelError(what, where=where, fix="fetch the model again")
    return arch, names


class Source:
    """A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors.

    Raises:
        ModelError: the journal is damaged, or does not name just the tensors that the stored patches edit.
        PatchError: a stored patch is missing, damaged, or another than the journal says.
    """

    def __init__(self, checkpoint: Checkpoint, base: str | Path | None, unrecorded: Patch | None = None) -> None:
        self.checkpoint = checkpoint
        self.journal = read_journal(checkpoint.folder)
        self.arch, self.names = layout(checkpoint)
        self.projections = {p.name: p for p in self.arch.projections}
        self.module_of = {name: module for module, names in self.names.items() for name in names}
        self.stack = [unrecorded] if unrecorded else [self._stored_patch(a) for a in self._applied]
        self.unrecorded = unrecorded is not None
        self._named_base = base
        self.base = BaseTensors(checkpoint, self.journal, base) if self.journal else None
        if self.journal:
            self._check_journal(self.journal)

    @property
    def _applied(self) -> Sequence[Applied]:
        return self.journal.patches if self.journal else ()

    @property
    def ids(self) -> list[str]:
        """Of the patches applied, in their order."""
        return [p.id for p in self.stack]

    def _stored_patch(self, applied: Applied) -> Patch:
        patch = Patch.load(self.checkpoint.folder / applied.file)
        if patch.id != applied.id:
            raise PatchError("not the patch the journal names", where=applied.file, fix="start again from the base")
        return patch

    def _check_journal(self, journal: Journal) -> None:
        """What is restored and what is checked goes by the patches' own word, not by the journal's alone."""
        edited = {n for p in self.stack for m in p.changes for n in self.tensors_of(m)}
        what = ""
        if lacking := edited - journal.tensors.keys():
            what = f"a stored patch edits '{min(lacking)}', and it is not in the journal"
        elif more := journal.tensors.keys() - edited:
            what = f"'{min(more):.200}' is in the journal, and no stored patch edits it"
        if what:
            fix = "put its mosectl.json and mosectl/ back as they were written, or start again from the base model"
            raise ModelError(what, where=str(self.checkpoint.folder / JOURNAL), fix=fix)

    def mismatches(self) -> list[tuple[str, str]]:
        """Edited tensors (and why) whose base, as the journal has it, is not the one that a stored patch was made for.

        Of a mixture the first expert's stand for all. A patch made on top of others that edit the same weight knows only
        what those made of it.
        """
        out = []
        for patch in self.stack:
            below = {m for q in self.stack if q.id in patch.parents for m in q.changes}
            known = set(patch.parents) <= set(self.ids)
            for module in (m for m in patch.base if known and m not in below):
                name = self.tensors_of(module)[0]
                if not self._made_for(patch.base[module], name):
                    out.append((name, f"its base is not the one that patch {patch.id[:12]} was made for"))
        return out

    def _made_for(self, made_for: BaseTensor, name: str) -> bool:
        assert self.journal is not None
        entry = self.checkpoint.entry(name)
        if entry.dtype == made_for.dtype and len(entry.shape) == 2:
            return self.journal.tensors[name].base_sha256 == made_for.sha256
        W0 = self.base_tensor(name)  # in another dtype, or among others in one tensor: only the weight itself can tell
        return W0 is None or match(made_for, W0).same

    def projection(self, module: str) -> Projection:
        """The edit site that a patch names; raises BaseMismatch where there is none."""
        if module not in self.projections:
            raise BaseMismatch(
                f"no module '{module}' in this {self.arch.model_type} model ({len(self.projections)} layers)",
                where=self.checkpoint.model,
                fix="give the model the patch was made for",
            )
        return self.projections[module]

    def edited_and_changed(self) -> list[str]:
        """Edited tensors that are not as the journal has them: something else has changed them since."""
        edited = self.journal.tensors.items() if self.journal else ()
        return [name for name, t in edited if sha256(self.checkpoint.read(name)) != t.sha256]

    def unedited_but_changed(self) -> list[str]:
        """Tensors that no patch has touched and that are not the base's; none where the base is out of reach.

        Only in files written later than the journal, which mosectl writes last: hashing a shard takes as long as copying it.
        """
        assert self.journal is not None and self.base is not None
        written = (self.checkpoint.folder / JOURNAL).stat().st_mtime_ns
        rest = {n: e.file for n, e in self.checkpoint.tensors.items() if n not in self.journal.tensors}
        later = {file for file in set(rest.values()) if file.stat().st_mtime_ns > written}
        names = [n for n, file in rest.items() if file in later]
        found: list[str] = []
        for model in self.base.models() if names else ():
            found = [n for n in names if not same_bytes(self.checkpoint, model, n)]
            if not found:  # the base's in one place: another has changed since
                break
        return found

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """The tensors on disk that hold a module's weight: one, or a mixture's experts; its base is known by the first."""
        return self.names[self.projection(module).name]

    def base_tensor(self, name: str) -> Tensor | None:
        """A tensor as it was before any patch, checked by hash; None when it is out of reach.

        Raises:
            BaseMismatch, ModelError, HubError: the base that was given is not this model's, or cannot be opened.
        """
        if self.unrecorded:
            return self._unrecorded_base(name)
        if self.base and self.base.journal.tensors.get(name):
            return self.base.find(name)
        return self.checkpoint.read(name)  # no patch has touched it

    def _unrecorded_base(self, name: str) -> Tensor | None:
        """Without a journal only a base that is given is known, and by the patch: of a mixture by its first expert."""
        if self._given is None:
            return None
        module = self.module_of[name]
        known = match(self.stack[0].base[module], self._given.read(self.tensors_of(module)[0])).same
        return self._given.read(name) if known else None

    @cached_property
    def _given(self) -> Checkpoint | None:
        return open_checkpoint(self._named_base) if self._named_base else None

    def originals(self) -> dict[str, Tensor] | None:
        """The edited tensors (by name on disk) as they were; None where one is out of reach. Raises as base_tensor."""
        return self.base.find_all() if self.base else {}

    @property
    def out_of_reach(self) -> str:
        """Why a base tensor is not found, and how a base from the Hub is had."""
        return out_of_reach(self.journal)


def stored_patches(checkpoint: Checkpoint) -> list[Patch]:
    """The patches an edited folder keeps, in the order they were applied; none in a plain one.

    Raises:
        ModelError, PatchError: as :class:`Source`.
    """
    return Source(checkpoint, None).stack if read_journal(checkpoint.folder) else []
