"""The patch file, `mosectl-patch` format 1: a safetensors file of rotations (or of low-rank additions) with one record.

Specified in patches/FORMAT.md. Everything is checked on reading: a patch comes from strangers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from mosectl.errors import PatchError
from mosectl.patch.change import Change
from mosectl.patch.reader import DAMAGED, contents
from mosectl.patch.record import FORMAT, KEY, BaseTensor, PatchFact
from mosectl.storage.atomic import write_tensors
from mosectl.storage.inputs import MAX_JSON, opened
from mosectl.storage.tensor_file import MAX_TENSORS
from mosectl.text import notebook


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
        return canonical(self.to_record())

    def to_record(self) -> dict[str, Any]:
        """The record of patches/FORMAT.md, without the id."""
        return {
            "format": FORMAT, "method": self.method, "side": self.side, "options": self.options, "model": self.model,
            "revision": self.revision, "model_type": self.model_type, "metrics": self.metrics, "seed": self.seed,
            "versions": self.versions, "parents": self.parents,
            "base": {name: t.to_record() for name, t in self.base.items()},
            "facts": [fact.to_record() for fact in self.facts],
        }  # fmt: skip

    @property
    def id(self) -> str:
        """sha256 over the record and every tensor's name, shape and little-endian bytes, in name order."""
        return content_id(self.record, self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every factor under its name in the file, such as "model.layers.5.mlp.down_proj.R"."""
        return {f"{module}.{kind}": f for module, c in self.changes.items() for kind, f in c.factors.items()}

    def _repr_html_(self) -> str:
        return notebook.shown(self)

    def save(self, path: str | Path) -> None:
        """Write the patch atomically; the same patch gives the same bytes.

        Raises:
            OutputError: the file cannot be written. PatchError: its record is larger than a patch file can hold.
        """
        record = canonical({**self.to_record(), "id": self.id})
        check_size(record, len(self.tensors))
        write_tensors(Path(path), self.tensors, {KEY: record})

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch file.

        Raises:
            PatchError: anything in it is not as patches/FORMAT.md says; the message names what and where.
        """
        with opened(path, PatchError, "check the path, and give a patch file") as file:
            try:
                return parsed(file)
            except PatchError as e:
                raise type(e)(e.what, where=f"{path}: {e.where}" if e.where else str(path), fix=e.fix) from e


def parsed(file: BinaryIO) -> Patch:
    """The patch in an open file, every byte of it checked.

    Raises:
        PatchError: with the tensor or record field that is wrong.
    """
    found, factors = contents(file)
    base = {name: BaseTensor.of(entry) for name, entry in found["base"].items()}
    facts = tuple(PatchFact.of(fact) for fact in found["facts"])
    rest = {k: v for k, v in found.items() if k not in ("format", "id")}
    changes = {module: Change(kinds) for module, kinds in factors.items()}
    patch = Patch(changes, **{**rest, "base": base, "facts": facts, "parents": tuple(found["parents"])})
    if found["id"] != patch.id:
        what = "the content is not what its id says: damaged or altered"
        raise PatchError(what, where="record.id", fix=DAMAGED)
    return patch


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
