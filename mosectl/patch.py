"""The patch file, `mosectl-patch` format 1: a safetensors file of rotations (or of low-rank additions) with one record.

Specified in patches/FORMAT.md. Everything is checked on reading: a patch comes from strangers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mosectl.change import Change
from mosectl.errors import PatchError
from mosectl.files import write_tensors
from mosectl.inputs import MAX_JSON
from mosectl.tensor_file import MAX_TENSORS

FORMAT = 1
KEY = "mosectl"


@dataclass(frozen=True)
class BaseTensor:
    """What one edited weight was before the edit."""

    tensor: str  # weight name in the model, e.g. "model.layers.5.mlp.down_proj.weight"; of a mixture the first expert's
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", "F16", "F32"
    sha256: str  # of the raw bytes
    sample: tuple[float, ...]  # evenly spaced entries: recognises the same weights in another dtype

    @staticmethod
    def of(entry: Mapping[str, Any]) -> BaseTensor:
        """From a record's entry."""
        return BaseTensor(**{**entry, "shape": tuple(entry["shape"]), "sample": tuple(map(float, entry["sample"]))})


@dataclass(frozen=True)
class PatchFact:
    """One edited fact with what the model said before and after."""

    prompt: str
    subject: str
    target_new: str
    before: str
    after: str
    probability_before: float
    probability_after: float
    status: str  # "changed", "already known", "not reached", "not finite"
    wordings: tuple[str, ...] = ()  # other prompts that were edited along with it, the model's own
    space_before_target: bool | None = None  # as the facts file said; in the record only if it did


@dataclass(frozen=True)
class Patch:
    """What changes in each edited weight, by module path and in the order of the layers, and how it came about."""

    changes: Mapping[str, Change] = field(repr=False)
    method: str
    side: str
    options: dict[str, Any]
    model: str
    revision: str | None
    model_type: str
    base: Mapping[str, BaseTensor] = field(repr=False)  # by module path, same keys as changes
    facts: tuple[PatchFact, ...] = field(repr=False)
    metrics: dict[str, Any]
    seed: int
    versions: dict[str, str]
    parents: tuple[str, ...] = field(default=())  # ids of the patches it was computed on top of

    @property
    def record(self) -> str:
        """Everything but the tensors as canonical JSON: sorted keys, no spaces, no dates."""
        return canonical(self._content())

    def _content(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "changes"}
        content["base"] = {name: vars(t) for name, t in self.base.items()}
        content["facts"] = [
            {k: v for k, v in vars(f).items() if k != "space_before_target" or v is not None} for f in self.facts
        ]
        return {"format": FORMAT, **content}

    @property
    def id(self) -> str:
        """sha256 over the record and every tensor's name, shape and little-endian bytes, in name order."""
        return content_id(self.record, self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every factor under its name in the file, such as "model.layers.5.mlp.down_proj.R"."""
        return {f"{module}.{kind}": f for module, c in self.changes.items() for kind, f in c.factors.items()}

    def save(self, path: str | Path) -> None:
        """Write the patch atomically; the same patch gives the same bytes.

        Raises:
            OutputError: the file cannot be written. PatchError: its record is larger than a patch file can hold.
        """
        record = canonical({**self._content(), "id": self.id})
        check_size(record, len(self.tensors))
        write_tensors(Path(path), self.tensors, {KEY: record})

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch file.

        Raises:
            PatchError: anything in it is not as patches/FORMAT.md says; the message names what and where.
        """
        from mosectl.patch_reader import load  # it makes patches

        return load(path)


def check_size(record: str, tensors: int) -> None:
    """Will a file with this record and so many tensors be read again?

    Raises:
        PatchError.
    """
    if tensors > MAX_TENSORS:
        what = f"{tensors:,} tensors, a patch file holds {MAX_TENSORS:,}"
        raise PatchError(what, fix="make several patches and apply them one after the other")
    # As the header holds it: a JSON text within JSON; an entry takes some 200 bytes.
    size = len(json.dumps(record, ensure_ascii=False).encode()) + 200 * tensors
    if size > MAX_JSON:
        what = f"the record takes {size / 1e6:.0f} MB, a patch file holds {MAX_JSON / 1e6:.0f} MB of it"
        raise PatchError(what, fix="make several patches and apply them one after the other")


def content_id(record: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a record and every tensor's name, shape and little-endian bytes, in name order."""
    digest = hashlib.sha256(record.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\0{name}{list(x.shape)}\0".encode())
        digest.update(x.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def canonical(content: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces; numbers that are not finite are refused.

    Raises:
        ValueError.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
