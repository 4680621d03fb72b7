"""Facts to a facts file: JSON lines of mosectl's own shape, which give the same facts when they are read again.

A line that mosectl wrote carries a digest of itself, by which a file that nobody has changed since is known again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mosectl.facts.records import Fact, Probe
from mosectl.storage.inputs import parse_json

MARK = "missed"  # the field of a line that says why it was written, and its digest


@dataclass(frozen=True)
class Missed:
    """A fact that did not take."""

    prompt: str
    subject: str
    target_new: str
    status: str  # as mosectl.editing.outcome.FactResult has it


def row_of(fact: Fact) -> dict[str, Any]:
    """A fact as a facts file has it; what it does not use is not in it."""

    def asked(text: str) -> str:
        # Read again, "{}" stands for the subject: where a subject holds one, it is to stand where it did.
        return text.replace(fact.subject, "{}") if "{}" in text else text

    row = {
        "prompt": asked(fact.prompt), "subject": fact.subject, "target_new": fact.target_new,
        "ground_truth": fact.ground_truth, "rephrase_prompts": [asked(p) for p in fact.rephrase_prompts],
        "target_aliases": [*fact.target_aliases], "locality": [*map(_probe, fact.locality)],
        "portability": [*map(_probe, fact.portability)], "space_before_target": fact.space_before_target,
    }  # fmt: skip
    return {k: v for k, v in row.items() if v is not None and v != []}


def _probe(probe: Probe) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": probe.prompt, "ground_truth": probe.answer, "group": probe.group}
    row |= {"aliases": [*probe.aliases], "needs": [*map(_probe, probe.needs)]}
    return {k: v for k, v in row.items() if v}


def lines(facts: Iterable[tuple[Fact, str]]) -> bytes:
    """A line a fact, each with why it was written."""
    rows = ((row_of(fact), why) for fact, why in facts)
    marked = ({**row, MARK: {"status": why, "digest": _digest(row, why)}} for row, why in rows)
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in marked)


def unchanged(data: bytes) -> bool:
    """Is this what :func:`lines` has written, or some of its lines, none of them changed?"""
    try:
        rows = [parse_json(line) for line in data.split(b"\n") if line.strip()]
    except ValueError:
        return False
    return bool(rows) and all(isinstance(row, Mapping) and _is_whole(dict(row)) for row in rows)


def missed_in(data: bytes) -> list[Missed]:
    """The facts of a file that :func:`lines` has written, with why.

    Raises:
        ValueError: it is not one, or was changed since.
    """
    if not unchanged(data):
        raise ValueError("is not as mosectl edit wrote it")
    rows = [parse_json(line) for line in data.split(b"\n") if line.strip()]
    return [
        Missed(r["prompt"].replace("{}", r["subject"]), r["subject"], r["target_new"], r[MARK]["status"]) for r in rows
    ]


def _is_whole(row: dict[str, Any]) -> bool:
    mark = row.pop(MARK, None)
    return isinstance(mark, Mapping) and mark.get("digest") == _digest(row, str(mark.get("status")))


def _digest(row: Mapping[str, Any], why: str) -> str:
    return hashlib.sha256(json.dumps([row, why], sort_keys=True).encode()).hexdigest()[:16]
