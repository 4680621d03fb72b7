"""`mosectl.json`: what an edited checkpoint folder was made of, so that it can be undone and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mosectl.errors import ModelError
from mosectl.storage.atomic import write_bytes
from mosectl.storage.checkpoint import JOURNAL, SIDECAR
from mosectl.storage.inputs import read_json

MAX_TEXT = 4096  # characters of a name or path
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(rf"{SIDECAR}/([0-9a-f]{{16}}(?:[0-9a-f]{{48}})?)\.safetensors")  # the id, or 16 digits of it


@dataclass(frozen=True)
class Applied:
    """One patch of the stack, in the order of application."""

    id: str
    file: str  # inside the edited folder
    facts: int


@dataclass(frozen=True)
class EditedTensor:
    """sha256 of one weight before any patch and now."""

    base_sha256: str
    sha256: str


@dataclass(frozen=True)
class Journal:
    """The record beside an edited checkpoint's weights."""

    model: str
    revision: str | None
    base_path: str  # where the base was read; may be gone
    kept_base: bool  # the base tensors lie in mosectl/base.safetensors
    patches: tuple[Applied, ...]
    tensors: dict[str, EditedTensor] = field(default_factory=dict)  # by tensor name on disk

    def write(self, folder: Path) -> None:
        """Write it into a folder; the same journal gives the same bytes."""
        text = json.dumps({"format": 1, **asdict(self)}, indent=2, sort_keys=True, ensure_ascii=False)
        write_bytes(folder / JOURNAL, text.encode() + b"\n")


def read_journal(folder: Path) -> Journal | None:
    """The folder's journal, or None for a plain checkpoint. A field that is not known here is refused: what mosectl
    deletes and restores is decided by this file.

    Raises:
        ModelError: there is one and it cannot be understood.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    fix = "start again from the base model"
    content = read_json(path, ModelError, fix)
    try:
        return _journal(content)
    except ValueError as e:
        raise ModelError(f"damaged journal: {e}", where=str(path), fix=fix) from e


def _journal(content: Any) -> Journal:
    """Check every field. Raises ValueError."""
    known = ("format", "model", "revision", "base_path", "kept_base", "patches", "tensors")
    fields = dict(zip(known, _fields(content, "the journal", known), strict=True))
    if type(fields["format"]) is not int or fields.pop("format") != 1:
        raise ValueError("unknown format: update mosectl")
    revision = fields["revision"]
    if not _text(fields["model"]) or not _text(fields["base_path"]) or not (revision is None or _text(revision)):
        raise ValueError("'model', 'revision' or 'base_path' is not a text")
    if not isinstance(fields["kept_base"], bool):
        raise ValueError("'kept_base' is not true or false")
    listed, named = fields.pop("patches"), fields.pop("tensors")
    if not isinstance(listed, list) or not isinstance(named, dict) or not listed or not named:
        raise ValueError("'patches' or 'tensors' is empty or of the wrong type")
    patches = tuple(_applied(entry, f"patches[{i}]") for i, entry in enumerate(listed))
    if len({p.id for p in patches}) < len(patches):
        raise ValueError("a patch stands twice in it")
    return Journal(**fields, patches=patches, tensors={name: _edited(t, name) for name, t in named.items()})


def _applied(entry: Any, where: str) -> Applied:
    found = Applied(*_fields(entry, where, ("id", "file", "facts")))
    if not _is_sha256(found.id):
        raise ValueError(f"{where}.id is not a patch id")
    name = _FILE.fullmatch(found.file) if isinstance(found.file, str) else None
    if not name or not found.id.startswith(name[1]):
        raise ValueError(f"{where}.file is not {SIDECAR}/<id>.safetensors")
    if type(found.facts) is not int or not 0 <= found.facts < 2**31:
        raise ValueError(f"{where}.facts is not a number")
    return found


def _edited(entry: Any, name: str) -> EditedTensor:
    found = EditedTensor(*_fields(entry, f"tensors.{name[:80]}", ("base_sha256", "sha256")))
    if not _is_sha256(found.sha256) or not _is_sha256(found.base_sha256):
        raise ValueError(f"tensors.{name[:80]} holds no sha256")
    return found


def _fields(entry: Any, where: str, known: Sequence[str]) -> list[Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object")
    if wrong := sorted(set(known) ^ set(entry)):
        raise ValueError(f"{where} lacks or has besides: {', '.join(wrong)[:80]}")
    return [entry[name] for name in known]


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and "\0" not in value


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
