"""`mosectl.json`: what an edited checkpoint folder was made of, so that it can be undone and checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mosectl.checkpoint import JOURNAL
from mosectl.errors import ModelError
from mosectl.files import write_bytes


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

    @property
    def places(self) -> list[tuple[str, str | None]]:
        """Where the unedited model may be: folder or hub id, and revision. A hub id without one may hold other weights."""
        return [(self.base_path, None), *([(self.model, self.revision)] if self.revision else [])]

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": 1, **asdict(self)}, indent=2, sort_keys=True, ensure_ascii=False)
        write_bytes(folder / JOURNAL, text.encode() + b"\n")


def read_journal(folder: Path) -> Journal | None:
    """The folder's journal, or None for a plain checkpoint.

    Raises:
        ModelError: there is one and it cannot be understood.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format") != 1:
            raise ValueError("unknown format")
        content["patches"] = tuple(Applied(**p) for p in content["patches"])
        content["tensors"] = {name: EditedTensor(**t) for name, t in content["tensors"].items()}
        if any(Path(p.file).is_absolute() or ".." in Path(p.file).parts for p in content["patches"]):
            raise ValueError("a patch file outside the folder")
        journal = Journal(**content)
        texts = [journal.model, journal.base_path, *(p.file for p in journal.patches), *(p.id for p in journal.patches)]
        texts += [x for t in journal.tensors.values() for x in (t.base_sha256, t.sha256)]
        if not all(isinstance(t, str) for t in texts) or not isinstance(journal.revision, str | None):
            raise ValueError("a field is not a text")
        return journal
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        why = str(e) if isinstance(e, ValueError | OSError) else "a field is missing or wrong"
        raise ModelError(f"damaged journal: {why}", where=str(path), fix="start again from the base model") from e
