"""A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosectl.arch import Architecture, Projection, disk_names, resolve, skeleton
from mosectl.checkpoint import JOURNAL, SIDECAR, Checkpoint, open_checkpoint
from mosectl.errors import BaseMismatch, HubError, ModelError, PatchError
from mosectl.fingerprint import match, sha256
from mosectl.journal import Applied, Journal, read_journal
from mosectl.patch import Patch

KEPT_BASE = f"{SIDECAR}/base.safetensors"


class Source:
    """A checkpoint to start from: its layers, the patches it holds and, where they can be reached, its base tensors."""

    def __init__(self, checkpoint: Checkpoint, base: str | Path | None, unrecorded: Patch | None = None) -> None:
        self.checkpoint = checkpoint
        self.journal = read_journal(checkpoint.folder)
        self.arch: Architecture = resolve(skeleton(checkpoint.config))
        self.names = disk_names(self.arch, checkpoint.tensors)
        self.projections = {p.name: p for p in self.arch.projections}
        self.module_of = {name: module for module, names in self.names.items() for name in names}
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
        with suppress(ModelError, HubError):
            if later and (base := find_base(self.journal, self.base_path)):
                return [n for n, file in rest.items() if file in later and not same_bytes(self.checkpoint, base, n)]
        return []

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """The tensors on disk that hold a module's weight: one, or a mixture's experts; its base is known by the first."""
        return self.names[self.projection(module).name]

    def base_tensor(self, name: str) -> Tensor | None:
        """A tensor as it was before any patch, checked by hash; None when it is out of reach."""
        if self.unrecorded:
            if not self.base_path:
                return None
            other, module = open_checkpoint(self.base_path), self.module_of[name]
            known = match(self.stack[0].base[module], other.read(self.tensors_of(module)[0])).same
            return other.read(name) if known else None
        edited = self.journal.tensors.get(name) if self.journal else None
        if edited is None:  # no patch has touched it
            return self.checkpoint.read(name)
        return next((t for t in self._candidates(name) if sha256(t) == edited.base_sha256), None)

    def _candidates(self, name: str) -> Iterator[Tensor]:
        kept = self.checkpoint.folder / KEPT_BASE
        # None kept, or damaged: there may be another place.
        with suppress(SafetensorError, OSError), safe_open(kept, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  (not a dict)
                yield file.get_tensor(name)
        if self._other is False:
            assert self.journal is not None
            self._other = find_base(self.journal, self.base_path)
        if isinstance(self._other, Checkpoint) and name in self._other.tensors:
            yield self._other.read(name)


def same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Is the tensor the same in both? One file on disk is told without reading it."""
    if name not in a.tensors or name not in b.tensors:
        return False
    x, y = a.tensors[name], b.tensors[name]
    if x.file.samefile(y.file) and (x.start, x.stop) == (y.start, y.stop):
        return True
    return (x.dtype, x.shape) == (y.dtype, y.shape) and sha256(a.read(name)) == sha256(b.read(name))


def find_base(journal: Journal, given: str | Path | None = None) -> Checkpoint | None:
    """The unedited model: as ``given``, else the first of the journal's places that can be opened.

    Raises:
        ModelError, HubError: ``given`` cannot be opened.
    """
    if given:
        return open_checkpoint(given)
    for place, revision in journal.places:
        with suppress(ModelError, HubError):
            return open_checkpoint(place, revision)
    return None
