"""The two sides of an evaluation: the model before an edit and with it, from a patch or from an edited folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mosectl.checkpoints.apply import check_stack, check_stored
from mosectl.checkpoints.base import Source, stored_patches
from mosectl.checkpoints.base_tensors import BaseTensors
from mosectl.checkpoints.journal import read_journal
from mosectl.checkpoints.live import patched
from mosectl.errors import Notice, UsageError
from mosectl.hub.place import is_place, local
from mosectl.model.architecture import disk_names, resolve
from mosectl.model.loading import Check, Loaded, check_where, load
from mosectl.model.weights import exchanged, weights_of
from mosectl.patch.file import Patch
from mosectl.patch.record import PatchFact
from mosectl.storage.checkpoint import open_checkpoint
from mosectl.storage.gguf_header import is_gguf
from mosectl.storage.hub import cached_model, looks_like_repo
from mosectl.storage.hub_gguf import named
from mosectl.text.shown import word

T = TypeVar("T")
Ask = Callable[[Loaded, str], T]  # the model, and "before" or "after"


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and what "before" means."""

    kind: str  # "patch", "edited model" or "model"
    name: str
    base: str | None  # where the answers from before the edit come from; None: there are none
    patches: tuple[str, ...]  # ids, in order
    records: tuple[PatchFact, ...] = field(repr=False)  # what these patches recorded right after their edit
    corpora: tuple[str, ...]  # sha256 of the texts that served their edits as statistics
    chat: bool  # one of them was made with --chat
    in_order: bool = False  # these facts were edited one patch or batch after the other, not all at once


@dataclass(frozen=True)
class How:
    """How models are loaded."""

    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False
    check: Check = lambda model, tokenizer: None  # of a model before its weights are loaded

    def load(self, model: Any, revision: str | None) -> Loaded:
        """A model where and as it is asked for; one in memory as it is."""
        if isinstance(model, Loaded):
            self.check(model.model, model.tokenizer)
            return model
        return load(model, revision=revision, device=self.device, dtype=self.dtype, check=self.check)


def both_sides(what: Any, model: Any, base: Any, how: How, ask: Ask[T]) -> tuple[Subject, T | None, T]:
    """Ask before and after; ``what`` is a patch (or its file), or an edited or plain model.

    Raises:
        PatchError, BaseMismatch, ModelError, HubError, UsageError.
    """
    check_where(how.device, how.dtype)
    if isinstance(what, Patch) or (isinstance(what, str | Path) and _is_patch(what)):
        if base is not None:
            raise UsageError("--base is for edited models, this is a patch", fix="give its model by --model")
        patch = what if isinstance(what, Patch) else Patch.load(local(what))
        return _with_patch(patch, patch.id[:12] if isinstance(what, Patch) else str(what), model, how, ask)
    if model is not None:
        fix = "the unedited model is given by --base"
        raise UsageError(f"--model is for patches, {_name(what)} is a model", fix=fix)
    return _of_model(what, base, how, ask)


def _is_patch(what: str | Path) -> bool:
    path = Path(what)
    if is_gguf(path):
        return False
    return is_place(what) or path.is_file() or (path.suffix == ".safetensors" and not path.is_dir())


def _name(model: Any) -> str:
    if isinstance(model, Loaded):
        return model.checkpoint.model if model.checkpoint else "the model in memory"
    return str(model)


def _with_patch(patch: Patch, name: str, model: Any, how: How, ask: Ask[T]) -> tuple[Subject, T | None, T]:
    revision, base = how.revision, patch.model if model is None else _name(model)
    if model is None:
        model, revision = _at_hand(patch, revision), None
    checkpoint = model.checkpoint if isinstance(model, Loaded) else open_checkpoint(model, revision)
    if checkpoint is not None and not how.force:
        check_stack(checkpoint, [patch])
    loaded = how.load(model, revision)
    before = ask(loaded, "before")
    with patched(loaded.model, patch, force=how.force or checkpoint is not None):
        after = ask(loaded, "after")
    earlier = stored_patches(checkpoint) if checkpoint else []
    return _subject("patch", name, f"{base} without the patch", [*earlier, patch]), before, after


def _at_hand(patch: Patch, revision: str | None) -> Path:
    """The folder or file of the model a patch names, here or in the Hub's local cache: a patch makes nothing be fetched."""
    commit = revision or patch.revision
    if patch.revision is None and (Path(patch.model).is_dir() or is_gguf(Path(patch.model))):
        return Path(patch.model)
    repo, file = named(patch.model)
    if patch.revision and commit and looks_like_repo(repo):
        found = cached_model(repo, commit, [file]) if file else cached_model(repo, commit)
        if found and (found / file).exists():
            return found / file
    if patch.revision is None:  # the name of a folder may be that of a hub model
        raise UsageError(f"the patch was made for '{patch.model}', not found here", fix="say where by --model")
    what = f"the patch was made for {patch.model} on the Hub, which is not in the cache"
    raise UsageError(what, fix=f"--model {word(patch.model)} fetches it")


def _of_model(what: Any, base: Any, how: How, ask: Ask[T]) -> tuple[Subject, T | None, T]:
    checkpoint = what.checkpoint if isinstance(what, Loaded) else open_checkpoint(what, how.revision)
    journal = read_journal(checkpoint.folder) if checkpoint else None
    source = Source(checkpoint, None) if checkpoint and journal else None
    patches = source.stack if source else []
    if source and not how.force:
        check_stored(source)
    kind, name = "edited model" if journal or base is not None else "model", _name(what)
    if base is not None:
        revision = None
        if checkpoint and journal and not isinstance(base, Loaded):
            bases = BaseTensors(checkpoint, journal, base)
            opened = bases.given if how.force else bases.checked
            revision = opened.revision if opened else None
        before = ask(how.load(base, revision), "before")  # one model in memory at a time
        after = ask(how.load(what, how.revision), "after")
        return _subject(kind, name, _name(base), patches), before, after
    unedited = source.originals() if source else None
    loaded = how.load(what, how.revision)
    if unedited is None:
        if source:
            warnings.warn(source.out_of_reach, Notice, stacklevel=2)
        return _subject(kind, name, None, patches), None, ask(loaded, "after")
    after = ask(loaded, "after")
    with _unedited(loaded, unedited):
        before = ask(loaded, "before")
    return _subject(kind, name, f"{name}, its base tensors", patches), before, after


def _subject(kind: str, name: str, base: str | None, patches: list[Patch]) -> Subject:
    # A trained editor's edit reads no statistics.
    corpora = [p.options.get("corpus") for p in patches if not p.options.get("editor")]
    return Subject(
        kind=kind,
        name=name,
        base=base,
        patches=tuple(p.id for p in patches),
        records=tuple(f for p in patches for f in _recorded(p.facts, p.options)),
        corpora=tuple(str(c.get("sha256")) for c in corpora if isinstance(c, dict)),
        chat=any(p.options.get("chat") is True for p in patches),
        in_order=len(patches) > 1 or any(_in_batches(p.facts, p.options) for p in patches),
    )


def _in_batches(facts: Sequence[PatchFact], options: Mapping[str, Any]) -> bool:
    """Were a patch's facts edited one batch after the other?"""
    size = options.get("batch_size")
    told = any(f.right_after is not None for f in facts) or bool(options.get("merged"))
    return told or (isinstance(size, int) and 0 < size < len(facts))


def _recorded(facts: Sequence[PatchFact], options: Mapping[str, Any]) -> Iterator[PatchFact]:
    """A patch's facts; where one batch was the whole run, its end is right after the batch."""
    if merged := options.get("merged"):
        at = 0
        for record in merged:
            end = at + len(record["facts"])
            yield from _recorded(facts[at:end], record["options"])
            at = end
        return
    whole = isinstance(options.get("batch_size"), int) and not _in_batches(facts, options)
    yield from (replace(f, right_after=f.after) if whole else f for f in facts)


@contextmanager
def _unedited(loaded: Loaded, originals: Mapping[str, Tensor]) -> Iterator[None]:
    """The edited model with its base tensors back inside the block."""
    assert loaded.checkpoint is not None
    arch = resolve(loaded.model)
    names = disk_names(arch, loaded.checkpoint.tensors)
    edited = [p for p in arch.projections if names[p.name][0] in originals]
    weights = [w for p in edited for w in weights_of(loaded.model, p)]
    unedited = [w for p in edited for w in p.as_live([originals[n] for n in names[p.name]])]
    with exchanged(zip(weights, unedited, strict=True)):
        yield
