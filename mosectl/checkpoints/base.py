"""A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from mosectl.checkpoints.journal import Applied, Journal, read_journal
from mosectl.errors import BaseMismatch, ModelError, PatchError
from mosectl.model.architecture import Architecture, Projection, disk_names, resolve, skeleton
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import match, sha256
from mosectl.patch.record import BaseTensor
from mosectl.storage.checkpoint import JOURNAL, SIDECAR, Checkpoint, header, open_checkpoint
from mosectl.storage.hub import cached_model, looks_like_repo

KEPT_BASE = f"{SIDECAR}/base.safetensors"


def layout(
    checkpoint: Checkpoint, meta_model: nn.Module | None = None
) -> tuple[Architecture, dict[str, tuple[str, ...]]]:
    """A checkpoint's layers, and the names on disk of each one's tensors, whose shapes are as config.json says.

    Args:
        meta_model: its skeleton, where there is one.
    Raises:
        ModelError: config.json claims more than the weight files hold or another shape, or the model is not supported.
    """
    arch = resolve(meta_model if meta_model is not None else skeleton(checkpoint.config, len(checkpoint.tensors)))
    names = disk_names(arch, checkpoint.tensors)
    for p in arch.projections:
        entry, wanted = checkpoint.tensors[names[p.name][0]], (p.p, p.d) if p.transposed else (p.d, p.p)
        fits = p.d in entry.shape and len(entry.shape) in (2, 3) if p.experts else entry.shape == wanted
        if not fits:
            what = f"has the shape {list(entry.shape)}, its config.json says {list(wanted)}"
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
        self.base_path = base
        if self.journal:
            self._check_journal(self.journal)

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
        if module not in self.projections:
            raise BaseMismatch(
                f"no module '{module}' in this {self.arch.model_type} model ({len(self.projections)} layers)",
                where=self.checkpoint.model,
                fix="give the model the patch was made for",
            )
        return self.projections[module]

    def foreign(self) -> list[str]:
        """Edited tensors that are not as the journal has them: something else has changed them since."""
        edited = self.journal.tensors.items() if self.journal else ()
        return [name for name, t in edited if sha256(self.checkpoint.read(name)) != t.sha256]

    def strangers(self) -> list[str]:
        """Tensors that no patch has touched and that are not the base's; none where the base is out of reach.

        Only in files written later than the journal, which mosectl writes last: hashing a shard takes as long as copying it.
        """
        assert self.journal is not None
        written = (self.checkpoint.folder / JOURNAL).stat().st_mtime_ns
        rest = {n: e.file for n, e in self.checkpoint.tensors.items() if n not in self.journal.tensors}
        later = {file for file in set(rest.values()) if file.stat().st_mtime_ns > written}
        if later and self._base:
            return [n for n, file in rest.items() if file in later and not same_bytes(self.checkpoint, self._base, n)]
        return []

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """The tensors on disk that hold a module's weight: one, or a mixture's experts; its base is known by the first."""
        return self.names[self.projection(module).name]

    def base_tensor(self, name: str) -> Tensor | None:
        """A tensor as it was before any patch, checked by hash; None when it is out of reach.

        Raises:
            BaseMismatch, ModelError, HubError: the base that was given is not this model's, or cannot be opened.
        """
        if self.unrecorded:
            if not self.base_path:
                return None
            other, module = open_checkpoint(self.base_path), self.module_of[name]
            known = match(self.stack[0].base[module], other.read(self.tensors_of(module)[0])).same
            return other.read(name) if known else None
        edited = self.journal.tensors.get(name) if self.journal else None
        if edited is None:  # no patch has touched it
            return self.checkpoint.read(name)
        for place in self._candidates():
            found = read_like(place, self.checkpoint, name) if place else None
            if found is not None and sha256(found) == edited.base_sha256:
                return found
        return None

    def _candidates(self) -> Iterator[Checkpoint | None]:
        """Where a base tensor may be read. One that was given is never passed over: it may be another model's."""
        if self.base_path:
            yield self._base
        yield self._kept
        yield self._base

    @cached_property
    def _kept(self) -> Checkpoint | None:
        return kept_base(self.checkpoint)

    @cached_property
    def _base(self) -> Checkpoint | None:
        assert self.journal is not None
        return find_base(self.checkpoint, self.journal, self.base_path)


def stored_patches(checkpoint: Checkpoint) -> list[Patch]:
    """The patches an edited folder keeps, in the order they were applied; none in a plain one.

    Raises:
        ModelError, PatchError: as :class:`Source`.
    """
    return Source(checkpoint, None).stack if read_journal(checkpoint.folder) else []


def same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Is the tensor the same in both? One file on disk is told without reading it."""
    if name not in a.tensors or name not in b.tensors:
        return False
    x, y = a.tensors[name], b.tensors[name]
    if x.file.samefile(y.file) and (x.start, x.stop) == (y.start, y.stop):
        return True
    return (x.dtype, x.shape) == (y.dtype, y.shape) and sha256(a.read(name)) == sha256(b.read(name))


def read_like(place: Checkpoint, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """A tensor of ``place``, where it has the dtype and shape that it has in ``checkpoint``."""
    theirs, ours = place.tensors.get(name), checkpoint.entry(name)
    if theirs is None or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return None
    return place.read(name)


def kept_base(checkpoint: Checkpoint) -> Checkpoint | None:
    """The base tensors that an edited folder keeps beside its weights; None: there are none, or they are damaged."""
    with suppress(ModelError):
        return Checkpoint(checkpoint.folder / SIDECAR, checkpoint.model, None, header(checkpoint.folder / KEPT_BASE))
    return None


def unlike(base: Checkpoint, checkpoint: Checkpoint, journal: Journal) -> list[str]:
    """Edited tensors that are not in ``base`` what the journal says they were."""

    def same(name: str, wanted: str) -> bool:
        found = read_like(base, checkpoint, name)
        return found is not None and sha256(found) == wanted

    return [name for name, t in journal.tensors.items() if not same(name, t.base_sha256)]


def given_base(journal: Journal, given: str | Path) -> Checkpoint:
    """The unedited model that a user names; by its hub id alone it is fetched in the journal's revision.

    Raises:
        ModelError, HubError: it cannot be opened.
    """
    known = str(given) == journal.model and not Path(given).exists()
    return open_checkpoint(given, journal.revision if known else None)


def find_base(checkpoint: Checkpoint, journal: Journal, given: str | Path | None = None) -> Checkpoint | None:
    """The unedited model, known by the edited tensors' hashes: as ``given``, else where the journal says, if that is a
    folder here or lies in the Hub's local cache. Nothing is fetched that was not asked for.

    Raises:
        BaseMismatch: ``given`` is another model. ModelError, HubError: it cannot be opened.
    """
    if given:
        base = given_base(journal, given)
        if wrong := unlike(base, checkpoint, journal):
            fix = f"give {journal.model} as it was" + (f", revision {journal.revision}" if journal.revision else "")
            where = f"{base.folder}: {wrong[0]}"
            raise BaseMismatch("is not the base this model was edited from", where=where, fix=fix)
        return base
    for place in _places(journal):
        with suppress(ModelError):
            base = open_checkpoint(place)
            if not unlike(base, checkpoint, journal):
                return base
    return None


def _places(journal: Journal) -> Iterator[Path]:
    with suppress(OSError):  # a name too long
        if Path(journal.base_path).is_dir():
            yield Path(journal.base_path)
    if journal.revision and (cached := cached_model(journal.model, journal.revision)):
        yield cached


def out_of_reach(journal: Journal) -> str:
    """Why there are no base tensors, and how a base from the Hub is had."""
    what = "the base is out of reach"
    named = journal.model if journal.revision else journal.base_path
    if not looks_like_repo(named):
        return what
    at = f"@{journal.revision[:12]}" if journal.revision else ""
    return f"{what}: it is {named}{at} on the Hub; --base {named} fetches it"


def originals(source: Source) -> dict[str, Tensor] | None:
    """An edited folder's tensors (by name on disk) as they were, checked by hash; None where the base is out of reach."""
    found: dict[str, Tensor] = {}
    for name in source.journal.tensors if source.journal else ():
        W0 = source.base_tensor(name)
        if W0 is None:
            return None
        found[name] = W0
    return found
