"""Checkpoint folders: find them, read single tensors, and write changed ones without touching anything else.

A rotated tensor has the dtype and shape of the old one, so its place in the safetensors file stays the same: a changed
shard is a copy of the old file with some byte ranges overwritten. Peak memory is one tensor and R, and no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosectl.errors import ModelError, UsageError
from mosectl.storage import gguf
from mosectl.storage.folders import recovered
from mosectl.storage.inputs import opened, read_header, read_json
from mosectl.storage.standins import refuse_stand_ins

CONFIG, GENERATION = "config.json", "generation_config.json"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
SINGLE, INDEX = f"model{SUFFIX}", f"model{INDEX_SUFFIX}"
SIDECAR = "mosectl"  # folder inside an edited checkpoint: base tensors and patches
JOURNAL = "mosectl.json"
_PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_TWIN = re.compile(
    r"(?:(?:pytorch_|tf_|flax_|rust_|ggml-)?model|consolidated)[-._]"
    r"(?:.*\.)?(?:safetensors|bin|pt|pth|h5|msgpack|ot|onnx|gguf|index\.json)|.*\.gguf"
)
# by safetensors' name; other types are not edited
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
    gguf: gguf.Gguf | None = None  # what the folder was unpacked from

    @property
    def origin(self) -> Path:
        """What the user has: the folder, or the GGUF file that it was unpacked from."""
        return (self.gguf.file if self.gguf else self.folder).resolve()

    @property
    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
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
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"stored as {entry.dtype}", where=f"{entry.file.name}: {name}", fix="use an unquantised checkpoint"
            )
        return entry


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder, a hub model (downloaded to Hugging Face's cache, or found there) or a GGUF file (unpacked).

    Raises:
        ModelError: no such folder, no config.json, weights missing, pickled or damaged.
        HubError: the Hub cannot be reached, or refuses.
    """
    folder, name, commit = locate(model, revision)
    return Checkpoint(folder, name, commit, index_tensors(folder), gguf.origin(folder))


def locate(model: str | Path, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str, str | None]:
    """The model's folder, its name (hub id, or the name of folder or file) and its commit; fetched or unpacked if need be.

    Args:
        weights: False fetches only config and tokenizer.
    Raises:
        ModelError, HubError: as :func:`open_checkpoint`. UsageError: a revision of a folder.
    """
    path, fix = Path(model), "give a folder with config.json, a .gguf file, or a hub id such as user/model"
    try:
        recovered(path)
        folder_here, here = path.is_dir(), path.exists()
    except OSError as e:  # a name too long
        raise ModelError(f"no such model folder: {e.strerror}", where=f"{str(model)[:80]}…", fix=fix) from e
    file = gguf.chosen(path) if here else None
    if revision is not None and (folder_here or file):
        what = f"--revision {revision}: is for hub models, {model} is a {'folder' if folder_here else 'file'}"
        raise UsageError(what, fix="leave it out, or give the hub id")
    if file:
        return gguf.unpacked(file), file.name, None
    if folder_here:
        return path, path.resolve().name or "model", None
    from mosectl.storage.hub import looks_like_repo
    from mosectl.storage.hub_gguf import named

    repo, wanted = named(str(model))
    if here or not looks_like_repo(repo):
        what = "is a file, not a model folder" if here else "no such model folder"
        raise ModelError(what, where=str(model), fix=fix)
    return _fetched(repo, wanted, revision, weights)


def _fetched(repo: str, wanted: str, revision: str | None, weights: bool) -> tuple[Path, str, str]:
    """A hub model as :func:`locate` has it. Where there is nothing else it may be a GGUF file, which is fetched whole."""
    from mosectl.storage.hub import fetch_model
    from mosectl.storage.hub_gguf import fetch_gguf

    folder, commit = (Path(), "") if wanted else fetch_model(repo, revision, weights=weights)
    bare = not (folder / CONFIG).exists() or (weights and not any(folder.glob(f"*{SUFFIX}")))
    # Some repositories of GGUF files have a config.json besides: their name tells.
    if (wanted or bare or "gguf" in repo.lower()) and (found := fetch_gguf(repo, wanted, revision)):
        file, name, commit = found
        return gguf.unpacked(file), name, commit
    return folder, repo, commit


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    refuse_stand_ins(folder)
    if not (folder / CONFIG).exists():
        raise ModelError("no config.json", where=str(folder), fix="give a model folder in Hugging Face layout")
    return _object(folder / CONFIG)


def check_generation_config(folder: Path) -> None:
    """transformers reads generation_config.json along with the weights, whatever is in it.

    Raises:
        ModelError: there is one, and it is not a JSON object.
    """
    if (folder / GENERATION).exists():
        _object(folder / GENERATION)


def _object(file: Path) -> dict[str, Any]:
    found = read_json(file, ModelError, "fetch the model again", special=True)
    if not isinstance(found, dict):
        raise ModelError("not a JSON object", where=str(file), fix="fetch the model again")
    return found


def index_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder, from the shards' headers alone; of two with one name transformers' choice."""
    tensors: dict[str, Entry] = {}
    for file in shard_files(folder):
        tensors |= header(file)
    return tensors


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files with the model's weights: those that transformers loads, and no others.

    transformers (5.24, ``_get_resolved_checkpoint_files``) takes what config.json names as ``transformers_weights``, else
    model.safetensors, else the index and its shards; before all of them the parts that a distributed training left.

    Raises:
        ModelError: there are none, or transformers would take others than these.
    """
    chosen = _chosen(folder)
    if chosen.name.endswith(INDEX_SUFFIX):
        return [folder / n for n in _shards(chosen)]
    return [chosen]


def _chosen(folder: Path) -> Path:
    """The one file, or the index, that transformers starts from."""
    named = read_config(folder).get("transformers_weights")
    if part := next((p.name for p in folder.glob("shard-*.safetensors") if _PART.match(p.name)), ""):
        what = f"transformers loads the parts of a distributed training ({part}) before all else; mosectl does not"
        raise ModelError(what, where=str(folder), fix="load it and save it with save_pretrained(new_folder)")
    if named is not None:
        plain = isinstance(named, str) and Path(named).name == named
        if not plain or not named.endswith((SUFFIX, INDEX_SUFFIX)) or not _is_file(folder / named):
            what = f"transformers_weights {named!r:.60} is not a safetensors file, or an index, of this folder"
            raise ModelError(what, where=str(folder / CONFIG), fix="fetch the model again")
        return folder / named
    if found := next((n for n in (SINGLE, INDEX) if (folder / n).is_file()), ""):
        return folder / found
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise ModelError(
            f"weights are pickled ({pickled[0]}); mosectl reads safetensors only",
            where=str(folder),
            fix="convert once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    others = ", ".join(sorted(p.name for p in folder.glob(f"*{SUFFIX}"))[:3])
    what = "no model.safetensors and no index" + (f", only {others}, which transformers does not load" * bool(others))
    raise ModelError(what, where=str(folder), fix="check the model folder")


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # a name too long
        return path.is_file()
    return False


def _shards(index: Path) -> list[str]:
    """The files an index names, in the order in which transformers reads them."""
    content = _object(index)
    weight_map = content.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) for n in names):
        what = "damaged index: its weight_map does not name a file for each tensor"
        raise ModelError(what, where=str(index), fix="fetch the model again")
    names = sorted(set(names))
    for name in names:
        what = "" if _is_file(index.parent / name) else "is missing"
        what = what if name.endswith(SUFFIX) else "is not a safetensors file"
        what = what if Path(name).name == name else "leaves the folder"
        if what:
            raise ModelError(f"shard {name!r:.80} {what}", where=str(index), fix="fetch the model again")
    return names


def twins(checkpoint: Checkpoint) -> list[str]:
    """Files of the folder that hold the model's weights once more, for another program; mosectl does not edit them.

    Told by their usual names, or as safetensors by a tensor's name. An index that transformers passes over counts too.
    """
    used = {_chosen(checkpoint.folder).name, *(e.file.name for e in checkpoint.tensors.values())}
    return sorted(p.name for p in checkpoint.folder.iterdir() if p.name not in used and _twin(p, checkpoint))


def _twin(file: Path, checkpoint: Checkpoint) -> bool:
    if not file.is_file():
        return False
    if _TWIN.fullmatch(file.name):
        return True
    if file.suffix != SUFFIX:
        return False
    with suppress(ModelError):
        return not checkpoint.tensors.keys().isdisjoint(header(file))
    return False


def header(file: Path) -> dict[str, Entry]:
    """Names, types and byte ranges of one safetensors file.

    Raises:
        ModelError: it is not a safetensors file, cut short, or its header does not fit its data.
    """
    fix = "fetch the model again"
    try:
        with opened(file, ModelError, fix) as f:
            content, base = read_header(f)
        with safe_open(file, framework="pt"):  # types, shapes and byte ranges fit each other and the file
            pass
    except (ValueError, OSError, SafetensorError) as e:
        raise ModelError(f"damaged weights: {e}", where=str(file), fix=fix) from e
    content.pop("__metadata__", None)
    return {
        name: Entry(file, v["dtype"], tuple(v["shape"]), *(base + at for at in v["data_offsets"]))
        for name, v in content.items()
    }


def tensor_bytes(tensor: Tensor, entry: Entry) -> bytes:
    """The bytes of ``tensor`` as ``entry`` stores it."""
    raw = tensor.to(DTYPES[entry.dtype]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert len(raw) == entry.stop - entry.start
    return raw
