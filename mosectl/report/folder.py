"""A folder looked through for what mosectl has made: patches, evaluations, results of a bench. No model is loaded.

What cannot be used is named with the reason and stops nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from mosectl.bench.runner import RESULTS, read_results
from mosectl.checkpoints.inspection import Inspection, inspect
from mosectl.checkpoints.journal import Journal, read_journal
from mosectl.editing.missed import beside
from mosectl.errors import BaseMismatch, MosectlError, PatchError, UsageError
from mosectl.facts.writer import Missed, missed_in
from mosectl.measure.evaluate import Evaluation
from mosectl.measure.evaluation_file import read_evaluation
from mosectl.measure.retention import Cohort, recorded_cohorts
from mosectl.patch.compose import Conflict, conflicts
from mosectl.patch.reader import EDITOR_KEY
from mosectl.patch.record import KEY
from mosectl.storage.checkpoint import CONFIG, GENERATION, JOURNAL
from mosectl.storage.inputs import opened, read_bytes
from mosectl.storage.progress import OnStep
from mosectl.storage.tensor_file import header_of

NOT_A_PATCH = "no patch of mosectl's"
NOT_AN_EVALUATION = "JSON, and not an evaluation (mosectl eval --json)"
FIX = "give a folder with patches, with documents of mosectl eval --json, or with the results of a bench"
OF_MODELS = (CONFIG, GENERATION, JOURNAL, "vocab.json", "tokenizer.json", "added_tokens.json", "chat_template.json")


@dataclass(frozen=True)
class LeftOut:
    """A file that is not in the report."""

    file: str
    why: str
    damaged: bool  # it is or was one of mosectl's own


@dataclass(frozen=True)
class PatchFile:
    """A patch and what lies beside it."""

    file: str
    written: str  # date of the file, UTC
    inspection: Inspection = field(repr=False)
    cohorts: tuple[Cohort, ...]  # as the patch has recorded them
    missed: tuple[Missed, ...]  # the facts of its file of missed ones


@dataclass(frozen=True)
class EvaluationFile:
    """An evaluation as a file holds it."""

    file: str
    evaluation: Evaluation = field(repr=False)


@dataclass(frozen=True)
class Folder:
    """What was found in a folder."""

    folder: str  # its name
    model: (
        Journal | None
    )  # of an edited model: its base and the stack of its patches, which are the first of ``patches``
    patches: tuple[PatchFile, ...]
    conflicts: tuple[Conflict, ...]  # of every two patches
    apart: int  # pairs of patches for models of different sizes, which have no conflicts
    evaluations: tuple[EvaluationFile, ...]
    results: tuple[Mapping[str, Any], ...]  # cells of a bench
    left_out: tuple[LeftOut, ...]

    def to_record(self) -> dict[str, Any]:
        """As `--json` has it: patches as `inspect --json` says them, evaluations as `eval --json`."""
        patches = [
            {
                "file": p.file, "written": p.written, "id": p.inspection.patch.id, **p.inspection.patch.to_record(),
                "file_bytes": p.inspection.file_bytes, "factors": p.inspection.factors, "cohorts": p.cohorts,
                "missed": p.missed,
            }
            for p in self.patches
        ]  # fmt: skip
        return {**vars(self), "patches": patches}


def read_by(folder: Path) -> list[Path]:
    """The files that :func:`look_through` would read, none of which a report may replace.

    Raises:
        UsageError: there is no such folder, or it may not be read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except (OSError, ValueError) as e:
        what = {"FileNotFoundError": "no such folder", "NotADirectoryError": "is a file, not a folder"}.get(
            type(e).__name__, f"cannot be read: {getattr(e, 'strerror', None) or e}"
        )
        raise UsageError(what, where=str(folder), fix=FIX) from e
    return [folder / name for name in names if _of_interest(name)]


def _of_interest(name: str) -> bool:
    return name.endswith((".safetensors", ".json", ".missed.jsonl")) or name == RESULTS


def look_through(folder: Path, on_step: OnStep | None = None) -> Folder:
    """Everything in a folder that a report can show.

    Raises:
        UsageError: there is no such folder, or nothing of mosectl's in it.
    """
    found = _Found(folder, read_by(folder), on_step or (lambda phase, done, total: None))
    if not (found.patches or found.evaluations or found.results or any(f.damaged for f in found.left_out)):
        others = ", ".join(f"{f.file}: {f.why}" for f in found.left_out[:3])
        what = "holds nothing to report: no patch, no evaluation, no results of a bench"
        raise UsageError(what + (f" ({others})" if others else ""), where=str(folder), fix=FIX)
    told, apart = _conflicts([p.inspection for p in found.patches])
    return Folder(
        folder.resolve().name, found.model, tuple(found.patches), told, apart, tuple(found.evaluations),
        tuple(found.results), tuple(found.left_out),
    )  # fmt: skip


class _Found:
    """What has been found so far."""

    def __init__(self, folder: Path, files: Sequence[Path], on_step: OnStep) -> None:
        self.folder = folder
        self.model: Journal | None = None
        self.patches: list[PatchFile] = []
        self.evaluations: list[EvaluationFile] = []
        self.results: list[Mapping[str, Any]] = []
        self.left_out: list[LeftOut] = []
        self.stack = dict(self._stack())
        tasks = [*self.stack, *files]
        for i, path in enumerate(tasks):
            on_step("read", i, len(tasks))
            self._take(path)

    def _stack(self) -> Iterator[tuple[Path, str]]:
        """The patches that an edited model keeps, in their order, with the ids that its journal names."""
        try:
            self.model = read_journal(self.folder)
        except (MosectlError, OSError) as e:
            self._leave(self.folder / JOURNAL, e, damaged=True)
        yield from ((self.folder / a.file, a.id) for a in (self.model.patches if self.model else ()))

    def _take(self, path: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                self._patch(path)
            elif path.name == RESULTS:
                self._bench(path)
            elif path.suffix == ".json" and not _of_a_model(path.name):
                self._evaluation(path)
        except (MosectlError, OSError) as e:
            self._leave(path, e, damaged=path.suffix != ".json" or _begins_as_ours(path))

    def _leave(self, path: Path, why: Exception | str, *, damaged: bool) -> None:
        said = f"{_inner(path, why)}{why.what}" if isinstance(why, MosectlError) else str(why)
        self.left_out.append(LeftOut(self._name(path), said, damaged))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _patch(self, path: Path) -> None:
        with opened(path, PatchError, FIX) as file:
            keys = header_of(file)[1].keys()
        if KEY not in keys:
            if EDITOR_KEY in keys:
                self._leave(path, "a trained editor (mosectl inspect shows it)", damaged=False)
            elif not path.with_name(JOURNAL).is_file():  # beside it: the edited model's weights
                self._leave(path, NOT_A_PATCH, damaged=False)
            return None
        found = inspect(path)
        if self.stack.get(path, found.patch.id) != found.patch.id:
            return self._leave(path, "not the patch that mosectl.json names", damaged=True)
        if same := next((p for p in self.patches if p.inspection.patch.id == found.patch.id), None):
            return self._leave(path, f"the same patch as {same.file}", damaged=False)
        cohorts, missed = recorded_cohorts(found.patch.facts), tuple(self._missed(beside(path)))
        self.patches.append(PatchFile(self._name(path), _date(path), found, cohorts, missed))
        return None

    def _missed(self, path: Path) -> list[Missed]:
        if not os.path.lexists(path):
            return []
        try:
            return missed_in(read_bytes(path, UsageError, FIX))
        except (MosectlError, ValueError) as e:
            self._leave(path, e, damaged=True)
            return []

    def _evaluation(self, path: Path) -> None:
        found = read_evaluation(path)
        if found is None:
            self._leave(path, NOT_AN_EVALUATION, damaged=False)
        else:
            self.evaluations.append(EvaluationFile(self._name(path), found))

    def _bench(self, path: Path) -> None:
        found, bad = read_results(path)
        self.results += found.values()
        for number, what in bad.items():
            self.left_out.append(LeftOut(f"{path.name}, line {number:,}", what, True))


def _inner(path: Path, e: MosectlError) -> str:
    """Where in a file something is wrong, without the file's own name."""
    inside = e.where.removeprefix(str(path)).removeprefix(": ")
    return f"{inside}: " if inside else ""


def _of_a_model(name: str) -> bool:
    return name in OF_MODELS or name.endswith((".index.json", "_config.json", "_map.json"))


def _begins_as_ours(path: Path) -> bool:
    """Does a file that is no JSON begin as mosectl eval --json begins?"""
    try:
        with opened(path, UsageError, FIX) as file:
            return file.read(64).split()[:2] == [b"{", b'"subject":']
    except MosectlError:
        return False


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _conflicts(found: Sequence[Inspection]) -> tuple[tuple[Conflict, ...], int]:
    """Those of every two patches, contradictions first, and how many pairs are for models of different sizes."""
    out: list[Conflict] = []
    apart = 0
    for a, b in combinations([i.patch for i in found], 2):
        try:
            out += conflicts([a, b])
        except BaseMismatch:
            apart += 1
    return tuple(sorted(out, key=lambda c: c.kind != "fact")), apart
