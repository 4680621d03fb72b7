"""The editor file: a trained hypernetwork as safetensors with one record, checked on reading like a patch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mosectl._version import __version__
from mosectl.errors import BaseMismatch, Notice, PatchError
from mosectl.hypernetwork.network import METHODS, Hypernet
from mosectl.model.edit_site import Projection
from mosectl.patch.file import canonical, content_id
from mosectl.patch.fingerprint import fingerprint, match
from mosectl.patch.reader import BASES, SHA256, SIZE, record_of
from mosectl.patch.reader import EDITOR_KEY as KEY
from mosectl.patch.record import KEY as PATCH
from mosectl.patch.record import BaseTensor
from mosectl.storage.atomic import write_tensors
from mosectl.storage.inputs import opened
from mosectl.storage.schema import anything, integer, listed, number, one_of, optional, text
from mosectl.storage.schema import record as fields
from mosectl.storage.tensor_file import MAX_TENSORS, header_of, layout, metadata, read

FORMAT = 1
_FIX = "give a file made by mosectl train-editor"
_COUNTS = ("facts", "validated_on", "batch_size", "steps")
_LOSSES = ("step", "validation", "edit", "generalization", "locality", "reached")
RECORD = fields(
    {
        "format": one_of(FORMAT), "id": SHA256, "method": one_of(*METHODS), "modules": listed(text, 1, MAX_TENSORS),
        "base": BASES, "model": text, "revision": optional(text), "model_type": text,
        "options": fields(
            {**dict.fromkeys(("p", "d", "rank", "blocks"), SIZE), **dict.fromkeys(_COUNTS, integer)}, others=anything
        ),
        "history": listed(fields(dict.fromkeys(_LOSSES, number), {"training": number}, others=number), 1),
        "facts": text, "version": text,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Editor:
    """A hypernetwork and what it was trained for."""

    net: Hypernet = field(repr=False)
    method: str  # one of METHODS
    modules: tuple[str, ...]  # module paths of the edited projections, lowest first
    base: Mapping[str, Mapping[str, Any]] = field(repr=False)  # by module path: fingerprint of the weight
    model: str
    revision: str | None
    model_type: str
    options: Mapping[str, Any]  # rank, blocks, and how it was trained
    history: Sequence[Mapping[str, float]]  # one entry a validation
    facts: str  # sha256 of the facts it was trained on
    version: str = __version__

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The network's weights, float32 on the CPU."""
        return {name: x.detach().float().cpu() for name, x in self.net.state_dict().items()}

    @property
    def id(self) -> str:
        """sha256 over the record and every tensor."""
        return content_id(canonical(self.record), self.tensors)

    @property
    def record(self) -> dict[str, Any]:
        """Everything but the tensors and the id."""
        return {"format": FORMAT, **{k: v for k, v in vars(self).items() if k != "net"}}

    def save(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises:
            OutputError.
        """
        write_tensors(Path(path), self.tensors, {KEY: canonical({**self.record, "id": self.id})})

    @staticmethod
    def load(path: str | Path) -> Editor:
        """Read and check an editor file.

        Raises:
            PatchError: it cannot be read, or something in it is not as it must be.
        """
        fix = "check the path, or make one: mosectl train-editor FACTS --method … --model MODEL -o FILE"
        with opened(path, PatchError, fix) as file:
            try:
                return _parsed(file)
            except PatchError as e:
                raise PatchError(e.what, where=f"{path}: {e.where}" if e.where else str(path), fix=e.fix or _FIX) from e

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Does the editor fit this model? Other weights of the same shapes are warned of.

        Args:
            weights: live weights by module path; of a model without any (on ``meta``) the shapes are looked at.
        Raises:
            BaseMismatch.
        """
        for name in self.modules:
            if name not in weights:
                raise BaseMismatch(f"no module '{name}' in this model", fix=f"give the editor's model, {self.model}")
            shape = list(weights[name].shape)
            if shape != list(self.base[name]["shape"]):
                what = f"the editor is for {self.model}: shape {self.base[name]['shape']}, here {shape}"
                raise BaseMismatch(what, where=name, fix="give that model, or train an editor for this one")
        if any(weights[name].is_meta for name in self.modules):
            return
        if not all(match(BaseTensor.of(self.base[name]), weights[name]).same for name in self.modules):
            what = f"the editor was trained on other weights of these layers ({self.model}): it may not reach its facts"
            warnings.warn(what, Notice, stacklevel=2)


def is_editor(path: str | Path) -> bool:
    """Does the file say that it is an editor? One that is cut short does too."""
    return KEY in metadata(Path(path))


def _parsed(file: BinaryIO) -> Editor:
    entries, metadata, start = header_of(file)
    if set(metadata) != {KEY}:
        raise PatchError("a patch, not a trained editor" if PATCH in metadata else "not an editor file", fix=_FIX)
    record = record_of(metadata[KEY], RECORD, FORMAT, "editor")
    modules, options = record["modules"], record["options"]
    if set(record["base"]) != set(modules) or len(set(modules)) != len(modules):
        raise PatchError("modules and base do not match", where="record.base")
    p, d, rank, blocks = (options[k] for k in ("p", "d", "rank", "blocks"))
    with torch.device("meta"):  # nothing of a stranger's sizes is allocated before the file is seen to hold it
        meta_model = Hypernet(len(modules), p, d, rank, blocks, spread=record["method"] == "horse")
    spans = layout(entries, file.seek(0, os.SEEK_END) - start)
    for name, bone in meta_model.state_dict().items():
        if name not in spans or spans[name].shape != tuple(bone.shape):
            raise PatchError(f"must be an F32 tensor of shape {list(bone.shape)}", where=name)
    if unknown := sorted(set(spans) - set(meta_model.state_dict())):
        raise PatchError(f"unknown tensor '{unknown[0][:80]}'", where="header", fix="do not use this editor")
    meta_model.load_state_dict(dict(read(file, start, spans)), assign=True)
    content = {k: v for k, v in record.items() if k not in ("format", "id")}
    editor = Editor(net=meta_model.requires_grad_(False), **{**content, "modules": tuple(modules)})
    if editor.id != record["id"]:
        what = "the content is not what its id says: damaged or altered"
        raise PatchError(what, where="record.id", fix="fetch the editor again")
    return editor


def base_of(projections: Sequence[Projection], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What the record keeps of each edited weight."""
    out = {}
    for p in projections:
        found = fingerprint(p.weight_name, weights[p.name])
        out[p.name] = {**asdict(found), "shape": list(found.shape), "sample": list(found.sample)}
    return out
