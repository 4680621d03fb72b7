"""Checkpoint folders: find them, read single tensors, and write changed ones without touching anything else.

A rotated tensor has the dtype and shape of the old one, so its place in the safetensors file stays the same: a changed
shard is a copy of the old file with some byte ranges overwritten. Peak memory is one tensor and R, and no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mosectl.errors import ModelError, UsageError
from mosectl.folders import recovered

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDECAR = "mosectl"  # folder inside an edited checkpoint: base tensors and patches
JOURNAL = "mosectl.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face layout with safetensors weights."""

    folder: Path
    model: str  # hub id, or the folder's name
    revision: str | None  # the commit, for hub models
    tensors: Mapping[str, Entry]

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.entry(name).file, framework="pt") as file:
            return file.get_tensor(name)

    def entry(self, name: str) -> Entry:
        """Where tensor ``name`` lies.

        Raises:
            ModelError: there is no such tensor, or its dtype cannot be edited.
        """
        if name not in self.tensors:
            raise ModelError(f"no tensor '{name}'", where=str(self.folder), fix="is this the model the patch is for?")
        entry = self.tensors[name]
        if entry.dtype not in _DTYPES:
            raise ModelError(
                f"stored as {entry.dtype}", where=f"{entry.file.name}: {name}", fix="use an unquantised checkpoint"
            )
        return entry


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder or a hub model (downloaded to the Hugging Face cache, or found there).

    Raises:
        ModelError: no such folder, no config.json, weights missing, pickled or damaged.
        HubError: the Hub cannot be reached, or refuses.
    """
    folder, name, commit = locate(model, revision)
    return Checkpoint(folder, name, commit, index_tensors(folder))


def locate(model: str | Path, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str, str | None]:
    """The model's folder, its name (hub id, or the folder's name) and its commit; fetched from the Hub if need be.

    Args:
        weights: False fetches only config and tokenizer.
    Raises:
        ModelError, HubError: as :func:`open_checkpoint`. UsageError: a revision of a folder.
    """
    path = Path(model)
    recovered(path)
    if path.is_dir():
        if revision is not None:
            what = f"--revision {revision}: is for hub models, {model} is a folder"
            raise UsageError(what, fix="leave it out, or give the hub id")
        return path, path.resolve().name or "model", None
    from mosectl.hub import fetch_model, looks_like_repo

    if path.exists() or not looks_like_repo(str(model)):
        what = "is a file, not a model folder" if path.exists() else "no such model folder"
        raise ModelError(what, where=str(model), fix="give a folder with config.json, or a hub id such as user/model")
    folder, commit = fetch_model(str(model), revision, weights=weights)
    return folder, str(model), commit


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as e:
        raise ModelError("no config.json", where=str(folder), fix="give a model folder in Hugging Face layout") from e
    except ValueError as e:
        raise ModelError(f"damaged: {e}", where=str(file), fix="fetch the model again") from e
    if not isinstance(config, dict):
        raise ModelError("not a JSON object", where=str(file), fix="fetch the model again")
    return config


def index_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder, from the shards' headers alone."""
    read_config(folder)
    tensors: dict[str, Entry] = {}
    for file in shard_files(folder):
        tensors |= _header(file)
    return tensors


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelError("damaged index", where=str(folder / INDEX), fix="fetch the model again") from e
        if bad := [n for n in names if Path(n).name != n]:
            raise ModelError(f"shard name {bad[0]!r} leaves the folder", where=str(folder / INDEX))
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise ModelError(f"shard {missing[0]} is missing", where=str(folder), fix="fetch the model again")
        return [folder / n for n in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise ModelError(
            f"weights are pickled ({pickled[0]}); mosectl reads safetensors only",
            where=str(folder),
            fix="convert once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise ModelError("no model.safetensors and no index", where=str(folder), fix="check the model folder")


def _header(file: Path) -> dict[str, Entry]:
    """Names, types and byte ranges of one safetensors file; safe_open has checked the file first."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except Exception as e:  # safetensors raises its own and OSError kinds alike
        raise ModelError(f"damaged weights: {e}", where=str(file), fix="fetch the model again") from e
    base = 8 + size
    return {
        name: Entry(file, v["dtype"], tuple(v["shape"]), base + v["data_offsets"][0], base + v["data_offsets"][1])
        for name, v in header.items()
        if name != "__metadata__"
    }


def tensor_bytes(tensor: Tensor, entry: Entry) -> bytes:
    """The bytes of ``tensor`` as ``entry`` stores it."""
    raw = tensor.to(_DTYPES[entry.dtype]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert len(raw) == entry.stop - entry.start
    return raw
