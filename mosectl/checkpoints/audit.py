"""What an edited folder is made of: its patches, whether all is still as it was written, which one moved an answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mosectl.checkpoints.apply import replayed
from mosectl.checkpoints.base import Source
from mosectl.checkpoints.base_tensors import KEPT_BASE, BaseTensors, out_of_reach, same_bytes
from mosectl.checkpoints.journal import Journal, read_journal
from mosectl.errors import BaseMismatch, ModelError, MosectlError, Notice, PatchError
from mosectl.model.architecture import disk_names, resolve
from mosectl.model.generation import answer
from mosectl.model.loading import check_where, load
from mosectl.model.questions import generate
from mosectl.model.weights import weights_of
from mosectl.patch.change import changed
from mosectl.patch.compose import Conflict, conflict_table, conflicts
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import sha256
from mosectl.storage.checkpoint import JOURNAL, Checkpoint, open_checkpoint
from mosectl.text.table import Grid

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One patch of an edited folder."""

    id: str
    file: str
    method: str
    made_on: tuple[str, ...]  # ids it was computed on top of
    facts: tuple[str, ...]  # "prompt → object"
    tensors: int


@dataclass(frozen=True)
class History:
    """An edited folder's patches in the order of application, and where that order matters."""

    folder: str
    model: str
    revision: str | None
    kept_base: bool
    patches: tuple[Entry, ...]
    conflicts: tuple[Conflict, ...]


def history(folder: str | Path) -> History:
    """Read a folder's journal and patches.

    Raises:
        ModelError: nothing was applied here, or the journal is damaged. PatchError: a patch is missing or damaged.
    """
    source, journal = _source(folder)
    _told(source)
    patches = source.stack
    entries = [
        Entry(p.id, a.file, p.method, p.parents, tuple(f"{f.prompt} → {f.target_new}" for f in p.facts), len(p.changes))
        for p, a in zip(patches, journal.patches, strict=True)
    ]
    return History(str(folder), journal.model, journal.revision, journal.kept_base, tuple(entries), conflicts(patches))


def _edited(folder: str | Path) -> tuple[Checkpoint, Journal]:
    checkpoint = open_checkpoint(folder)
    journal = read_journal(checkpoint.folder)
    if journal is None:
        raise ModelError("no mosectl.json: no patch is applied here", where=str(folder), fix="give an edited folder")
    return checkpoint, journal


def _source(folder: str | Path, base: str | Path | None = None) -> tuple[Source, Journal]:
    checkpoint, journal = _edited(folder)
    return Source(checkpoint, base), journal


def _told(source: Source) -> None:
    """What cannot be believed of a folder that is looked at only."""
    for name, why in source.mismatches():
        warnings.warn(f"{name}: {why}; see mosectl verify", Notice, stacklevel=3)


def history_tables(h: History) -> list[Grid]:
    """The patches in order, their facts, and what does not simply add up."""
    rows = [
        (
            str(i),
            p.id[:12],
            p.method,
            str(len(p.facts)),
            str(p.tensors),
            ", ".join(x[:12] for x in p.made_on) or "–",
        )
        for i, p in enumerate(h.patches, 1)
    ]
    facts = [(p.id[:12], f) for p in h.patches for f in p.facts]
    base = h.model + (f" @ {h.revision}" if h.revision else "") + (", its edited tensors kept" if h.kept_base else "")
    return [
        Grid(f"{h.folder}: {base}", (">", "patch", "method", ">facts", ">tensors", "made on top of"), tuple(rows)),
        Grid("Facts", ("patch", "fact"), tuple(facts)),
        conflict_table(h.conflicts),
    ]


# verify


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool | None  # None: could not be looked at
    note: str


def verify(folder: str | Path, *, base: str | Path | None = None, on_step: OnStep | None = None) -> tuple[Check, ...]:
    """Check every patch, every edited tensor and, where the base is in reach, every other tensor of an edited folder.

    The journal must name just the tensors that the patches edit, with the bases they were made for. Edited tensors must
    have the journal's sha256, and be what the patches make of the base, bit for bit. Tensors that no patch touches must be
    the base's: the same file on disk, or the same bytes. A base that is given must have what the journal says it had.

    Args:
        base: where the unedited model is; default: where the journal says, if it is on this disk.
    Raises:
        ModelError: nothing was applied here, the journal is damaged, or ``base`` cannot be opened. HubError. What is wrong
        with the folder's content is returned, not raised.
    """
    checkpoint, journal = _edited(folder)
    checks = [_patch_check(checkpoint, a.id, a.file) for a in journal.patches]
    known = sorted(journal.tensors)
    for i, name in enumerate(known):
        checks.append(_tensor_check(checkpoint, journal, name))
        if on_step:
            on_step(i + 1, len(known) + 1)
    bases = BaseTensors(checkpoint, journal, base)
    if journal.kept_base:
        checks.append(_kept_check(bases))
    if bases.given:
        checks.append(_given_check(bases.given, bases))
    if all(c.ok for c in checks[: len(journal.patches)]):
        checks += _source_checks(checkpoint, journal, base, replay=all(c.ok is not False for c in checks))
    checks.append(_untouched_check(checkpoint, journal, [bases.given] if bases.given else bases.models()))
    if on_step:
        on_step(len(known) + 1, len(known) + 1)
    return tuple(checks)


def _patch_check(checkpoint: Checkpoint, wanted: str, file: str) -> Check:
    try:
        found = Patch.load(checkpoint.folder / file).id
    except MosectlError as e:
        return Check(file, False, e.what)
    return Check(
        file, found == wanted, f"patch {found[:12]}" + ("" if found == wanted else f", expected {wanted[:12]}")
    )


def _tensor_check(checkpoint: Checkpoint, journal: Journal, name: str) -> Check:
    try:
        found = sha256(checkpoint.read(name))
    except ModelError as e:
        return Check(name, False, e.what)
    same = found == journal.tensors[name].sha256
    return Check(name, same, f"sha256 {found[:12]}, " + ("as the journal says" if same else "not the journal's"))


def _kept_check(bases: BaseTensors) -> Check:
    if bases.kept is None:
        return Check(KEPT_BASE, False, "cannot be read")
    wrong = sorted(bases.unlike(bases.kept))
    good = f"{len(bases.journal.tensors)} base tensors as they were"
    return Check(KEPT_BASE, not wrong, f"wrong: {', '.join(wrong)}" if wrong else good)


def _given_check(given: Checkpoint, bases: BaseTensors) -> Check:
    wrong = bases.unlike(given)
    note = f"not what the journal says they were: {', '.join(wrong[:5])}" if wrong else "as the journal says they were"
    return Check(f"{len(bases.journal.tensors)} edited tensors in {given.folder}", not wrong, note)


def _source_checks(checkpoint: Checkpoint, journal: Journal, base: str | Path | None, replay: bool) -> Iterator[Check]:
    try:
        source = Source(checkpoint, base if replay else None)  # a given base that is wrong is told already
    except (ModelError, PatchError) as e:
        yield Check(JOURNAL, False, e.what)
        return
    wrong = source.mismatches()
    note = (
        f"{wrong[0][0]}: {wrong[0][1]}" if wrong else "it names what the patches edit, and the bases they were made for"
    )
    yield Check(JOURNAL, not wrong, note)
    for name, weight in replayed(source).items() if replay else ():
        if weight is None:
            yield Check(f"{name} from the base", None, source.out_of_reach)
            continue
        same = sha256(weight) == journal.tensors[name].sha256
        note = "the patches give just this" if same else "the patches give another"
        yield Check(f"{name} from the base", same, note)


def _untouched_check(checkpoint: Checkpoint, journal: Journal, models: Iterable[Checkpoint]) -> Check:
    """Are the other tensors those of one of the unedited ``models``? Where of none, how they differ from the first."""
    rest = [n for n in checkpoint.tensors if n not in journal.tensors]
    what, found = f"{len(rest)} other tensors", None
    for original in models:
        wrong = [n for n in rest if not same_bytes(checkpoint, original, n)]
        wrong += [n for n in original.tensors if n not in checkpoint.tensors]
        if not wrong:
            return Check(what, True, f"as in {original.folder}")
        found = found or Check(what, False, f"differ from {original.folder}: {', '.join(wrong[:5])}")
    return found or Check(what, None, out_of_reach(journal))


# blame


@dataclass(frozen=True)
class Blame:
    """One prompt's answers as the stack grew."""

    prompt: str
    answers: tuple[str, ...]  # without any patch, with the first, with the first two, …
    moved_by: tuple[str, ...]  # ids of the patches after which the answer was another


def blame(
    prompts: Sequence[str],
    folder: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 12,
    on_step: OnStep | None = None,
) -> tuple[tuple[str, ...], tuple[Blame, ...]]:
    """Ids of the folder's patches in order, and each prompt's greedy answer under the first 0, 1, 2, … of them.

    Raises:
        ModelError: nothing was applied here, or its record is damaged. BaseMismatch: the base tensors are out of reach, or
        ``base`` is another model.
    """
    check_where(device, dtype)
    source, _ = _source(folder, base)
    _told(source)
    patches, bases = source.stack, source.originals()
    if bases is None:
        raise BaseMismatch(source.out_of_reach, where=str(folder), fix="give --base, or apply with --keep-base")
    loaded = load(folder, device=device, dtype=dtype)
    arch = resolve(loaded.model)
    names = disk_names(arch, source.checkpoint.tensors)
    edited = [(p, p.as_live([bases[n] for n in names[p.name]])) for p in arch.projections if names[p.name][0] in bases]
    said: list[list[str]] = []
    for n in range(len(patches) + 1):
        for p, W0s in edited:
            changes = [q.changes[p.name] for q in patches[:n] if p.name in q.changes]
            for weight, W in zip(weights_of(loaded.model, p), W0s, strict=True):
                with torch.no_grad():
                    weight.copy_(p.stored(changed(changes, p.oriented(W))))
        said.append(
            [answer(t) for t in generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=max_new_tokens)]
        )
        if on_step:
            on_step(n + 1, len(patches) + 1)
    ids = tuple(p.id for p in patches)
    out = []
    for prompt, answers in zip(prompts, zip(*said, strict=True), strict=True):
        moved = tuple(ids[i] for i in range(len(ids)) if answers[i + 1] != answers[i])
        out.append(Blame(prompt, tuple(answers), moved))
    return ids, tuple(out)
