"""What stands in a folder in place of a model: pointers that Git LFS left, an adapter."""

from __future__ import annotations

import os
from pathlib import Path

from mosectl.errors import ModelError
from mosectl.storage.inputs import read_bytes, read_json

POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # bytes of a pointer
_KINDS = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin")


def refuse_stand_ins(folder: Path) -> None:
    """Raises ModelError: files are Git LFS pointers, or the folder holds an adapter and no model."""
    try:
        with os.scandir(folder) as entries:
            small = sorted(
                e.path for e in entries if e.name.endswith(_KINDS) and e.is_file() and e.stat().st_size <= _LARGEST
            )
    except OSError:  # told by those who read the files
        return
    fix = "run in its repository: git lfs install && git lfs pull"
    if pointers := [p for p in small if read_bytes(p, ModelError, fix, _LARGEST).startswith(POINTER)]:
        names = ", ".join(Path(p).name for p in pointers[:3])
        raise ModelError(f"Git LFS pointers, not the files themselves: {names}", where=str(folder), fix=fix)
    file = folder / "adapter_config.json"
    if file.exists() and not (folder / "config.json").exists():
        content = read_json(file, ModelError, "fetch the adapter again", special=True)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        fix = "merge it first (PEFT's merge_and_unload), or give the base model" + (f": {base}" if base else "")
        raise ModelError("is an adapter, not a model (adapter_config.json)", where=str(folder), fix=fix)
