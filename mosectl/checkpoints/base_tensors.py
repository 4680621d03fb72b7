"""An edited checkpoint's tensors as they were before any patch: one search of every place, a tensor is known by its hash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mosectl.checkpoints.journal import Journal
from mosectl.errors import BaseMismatch, ModelError
from mosectl.patch.fingerprint import sha256
from mosectl.storage.checkpoint import SIDECAR, Checkpoint, header, open_checkpoint
from mosectl.storage.gguf_header import is_gguf
from mosectl.storage.hub import cached_model, looks_like_repo

KEPT_BASE = f"{SIDECAR}/base.safetensors"


@dataclass(frozen=True)
class BaseTensors:
    """The edited tensors from before any patch, wherever they lie: each must have the sha256 that the journal says.

    Places, in this order: the base that a user gives, the tensors kept beside the weights, the folder that the journal
    names, the Hub's local cache. Only a base that is given may be fetched from the Hub.
    """

    checkpoint: Checkpoint
    journal: Journal
    named: str | Path | None = None  # the base as the user names it

    @cached_property
    def given(self) -> Checkpoint | None:
        """The base that the user names, not checked; by its hub id alone it is fetched in the journal's revision.

        Raises:
            ModelError, HubError: it cannot be opened.
        """
        if not self.named:
            return None
        known = str(self.named) == self.journal.model and not Path(self.named).exists()
        return open_checkpoint(self.named, self.journal.revision if known else None)

    @cached_property
    def checked(self) -> Checkpoint | None:
        """The base that the user names.

        Raises:
            BaseMismatch: it is another model. ModelError, HubError: it cannot be opened.
        """
        if self.given and (wrong := self.unlike(self.given)):
            journal = self.journal
            fix = f"give {journal.model} as it was" + (f", revision {journal.revision}" if journal.revision else "")
            where = f"{self.given.folder}: {wrong[0]}"
            raise BaseMismatch("is not the base this model was edited from", where=where, fix=fix)
        return self.given

    @cached_property
    def kept(self) -> Checkpoint | None:
        """The base tensors that the edited folder keeps; None: there are none, or they are damaged."""
        folder = self.checkpoint.folder
        with suppress(ModelError):
            return Checkpoint(folder / SIDECAR, self.checkpoint.model, None, header(folder / KEPT_BASE))
        return None

    @cached_property
    def _elsewhere(self) -> tuple[Checkpoint, ...]:
        """What can be opened of the folder that the journal names and the Hub's cache."""
        found = []
        for place in self._folders():
            with suppress(ModelError):
                found.append(open_checkpoint(place))
        return tuple(found)

    def _folders(self) -> Iterator[Path]:
        journal, first = self.journal, Path(self.journal.base_path)
        with suppress(OSError):  # a name too long
            if first.is_dir() or is_gguf(first):
                yield first
        cached = cached_model(journal.model, journal.revision) if journal.revision else None
        if cached and cached.resolve() != first:  # the journal has a resolved path
            yield cached

    def find(self, name: str) -> Tensor | None:
        """An edited tensor as it was before any patch; None where no place has it.

        Raises:
            as :attr:`checked`: a base that is given is never passed over.
        """
        for place in self._places():
            found = _read_like(place, self.checkpoint, name)
            if found is not None and sha256(found) == self.journal.tensors[name].base_sha256:
                return found
        return None

    def _places(self) -> Iterator[Checkpoint]:
        yield from (place for place in (self.checked, self.kept) if place)
        yield from self._elsewhere

    def find_all(self) -> dict[str, Tensor] | None:
        """All edited tensors by their names on disk; None where one of them is out of reach. Raises as :meth:`find`."""
        found: dict[str, Tensor] = {}
        for name in self.journal.tensors:
            W0 = self.find(name)
            if W0 is None:
                return None
            found[name] = W0
        return found

    def models(self) -> Iterator[Checkpoint]:
        """Whole unedited models, whose other tensors can be compared: one that is given (checked), else all in reach."""
        if self.checked:
            yield self.checked
        else:
            yield from (place for place in self._elsewhere if not self.unlike(place))

    def unlike(self, place: Checkpoint) -> list[str]:
        """Edited tensors that are not in ``place`` what the journal says they were."""

        def same(name: str, wanted: str) -> bool:
            found = _read_like(place, self.checkpoint, name)
            return found is not None and sha256(found) == wanted

        return [name for name, t in self.journal.tensors.items() if not same(name, t.base_sha256)]


def _read_like(place: Checkpoint, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """A tensor of ``place``, where it has the dtype and shape that it has in ``checkpoint``."""
    theirs, ours = place.tensors.get(name), checkpoint.entry(name)
    if theirs is None or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return None
    return place.read(name)


def same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Is the tensor the same in both? One file on disk is told without reading it."""
    if name not in a.tensors or name not in b.tensors:
        return False
    x, y = a.tensors[name], b.tensors[name]
    if x.file.samefile(y.file) and (x.start, x.stop) == (y.start, y.stop):
        return True
    return (x.dtype, x.shape) == (y.dtype, y.shape) and sha256(a.read(name)) == sha256(b.read(name))


def out_of_reach(journal: Journal | None) -> str:
    """Why there are no base tensors, and how a base from the Hub is had."""
    what = "the base is out of reach"
    named = (journal.model if journal.revision else journal.base_path) if journal else ""
    if journal is None or not looks_like_repo(named):
        return what
    at = f"@{journal.revision[:12]}" if journal.revision else ""
    return f"{what}: it is {named}{at} on the Hub; --base {named} fetches it"
