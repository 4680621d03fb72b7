"""What mosectl keeps for itself to read again: statistics, and the states of interrupted edits and trainings.

A safetensors file whose metadata hold a record and the sha256 of the record and all tensors. Against accidents and other
versions, not against forgery: whoever can write such a file can write a checksum too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosectl.errors import OutputError
from mosectl.storage.atomic import write_tensors
from mosectl.storage.inputs import opened, parse_json, read_header
from mosectl.storage.schema import Check, Misfit


def digest(value: Any) -> str:
    """sha256 of a JSON value, for what a state belongs to; what JSON does not know goes in as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_state(path: Path, kind: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state atomically, in place of the one before.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    told = {"record": record, "sha256": _digest(kind, record, tensors)}
    write_tensors(path, tensors, {f"mosectl-{kind}": json.dumps(told)})


def read_record(path: Path, kind: str, form: Check, fix: str) -> dict[str, Any]:
    """The record of a state, without its tensors: fast, and without a look at the checksum.

    Raises:
        OutputError: as :func:`read_state`.
    """
    with opened(path, OutputError, fix) as file:
        try:
            record: dict[str, Any] = _told(file, kind)["record"]
        except _UNREADABLE as e:
            raise OutputError(_OTHER, where=str(path), fix=fix) from e
    _formed(record, form, path, fix)
    return record


def read_state(path: Path, kind: str, form: Check, fix: str, limit: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a state, as they were written.

    Args:
        form: of the record, see schema.py. limit: bytes that such a file may have.
    Raises:
        OutputError: there is none, or not as it was written; ``fix`` is the next step.
    """
    with opened(path, OutputError, fix, limit) as file:
        try:
            told = _told(file, kind)
            record, checksum = told["record"], told["sha256"]
            with safe_open(path, framework="pt") as stored:
                # Clones: the file's bytes lie unaligned in memory, where matrix products round differently.
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118  (not a dict)
            good = checksum == _digest(kind, record, tensors)
        except _UNREADABLE as e:
            raise OutputError(_OTHER, where=str(path), fix=fix) from e
    if not good:
        raise damaged(path, "its content is not what its checksum says", fix)
    _formed(record, form, path, fix)
    return record, tensors


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)
_OTHER = "is damaged, or of another version of mosectl"


def _told(file: BinaryIO, kind: str) -> Any:
    return parse_json(read_header(file)[0]["__metadata__"][f"mosectl-{kind}"], special=True)


def _formed(record: Any, form: Check, path: Path, fix: str) -> None:
    try:
        form(record)
    except Misfit as e:
        raise damaged(path, str(e), fix) from e


def damaged(path: Path, what: str, fix: str) -> OutputError:
    """The error to raise."""
    return OutputError(f"is damaged: {what}", where=str(path), fix=fix)


def _digest(kind: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over kind, record, and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{kind} {json.dumps(record, sort_keys=True)}".encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\0{name} {x.dtype} {list(x.shape)}\0".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
