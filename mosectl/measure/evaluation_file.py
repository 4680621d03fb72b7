"""An evaluation that `mosectl eval --json` has printed into a file, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mosectl.errors import UsageError
from mosectl.measure.evaluate import Evaluation
from mosectl.storage.inputs import read_json
from mosectl.storage.schema import Misfit
from mosectl.storage.typed import typed

FIX = "write it again: mosectl eval PATCH FACTS --json > FILE"
_OURS = {"subject", "metrics", "texts", "facts", "settings"}  # fields that no other document has together


def is_evaluation(document: Any) -> bool:
    """Does it look like one, whether or not it is a whole one?"""
    return isinstance(document, dict) and document.keys() >= _OURS


def read_evaluation(path: Path) -> Evaluation | None:
    """The evaluation in a JSON file; None: it is JSON of something else.

    Raises:
        UsageError: the file cannot be read, is not JSON, or a field of the evaluation is not as it is written.
    """
    document = read_json(path, UsageError, FIX)
    if not is_evaluation(document):
        return None
    try:
        found: Evaluation = typed(Evaluation, document)
        _check(found)
    except Misfit as e:
        raise UsageError(f"is no evaluation of this version: {e}", where=str(path), fix=FIX) from e
    return found


def _check(e: Evaluation) -> None:
    """What a page takes for granted beyond types. Raises Misfit."""
    if not isinstance(e.settings.get("protocols"), dict) or not {"resamples", "seed"} <= e.settings.keys():
        raise Misfit("lacks protocols, resamples or seed", "settings")
    try:
        typed(dict[str, str], e.settings["protocols"])
    except Misfit as found:
        raise found.within("settings.protocols") from None
    if any(not 1 <= b.first <= b.last for b in e.retention):
        raise Misfit("facts are not numbered from 1", "retention")
