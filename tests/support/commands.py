"""The command line in this process, and a folder with all that its commands take."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mosectl.cli import main
from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from support.facts import FACT
from support.models import save
from support.patches import patch_for

EASY = [
    "--layers",
    "0-2",
    "--set",
    "preserve=0.0001",
    "--set",
    "prefixes=0",
    "--set",
    "max_displacement=4",
    "--form",
    "compact",  # what models of real size begin with
]
EASY += [x for s in ("step_size=0.3", "margin=3", "decay=0", "kl_weight=0") for x in ("--set", s)]
# What accelerate launch calls for several GPUs; for CPUs alone it starts one process, whatever it is asked for.
TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def run(*args: object) -> int:
    """Run a command in this process; its exit code."""
    sys.argv = ["mosectl", *map(str, args)]
    try:
        main.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


class World:
    """A model, a facts file, a good patch and the folder they lie in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save(folder / "model")
        self.facts = folder / "facts.jsonl"
        self.facts.write_text(json.dumps(FACT))
        self.patch = folder / "p.safetensors"
        self.good = patch_for(self.model)
        self.good.save(self.patch)

    def state(self) -> dict[str, str]:
        """Every file's content, but for __pycache__ and the like: to see that nothing was lost or left over."""
        return {
            str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(self.folder.rglob("*"))
            if p.is_file()
        }

    def edit(self, *args: object) -> tuple[object, ...]:
        return ("edit", self.facts, "--model", self.model, "-o", self.folder / "new.safetensors", *EASY, *args)

    def apply(self, patch: Path | None = None) -> tuple[object, ...]:
        return ("apply", patch or self.patch, "--model", self.model, "-o", self.folder / "out")

    def spoilt(self, spoil: Callable[[bytes], bytes]) -> tuple[object, ...]:
        self.patch.write_bytes(spoil(self.patch.read_bytes()))
        return self.apply()

    def with_facts(self, data: bytes, *args: object) -> tuple[object, ...]:
        self.facts.write_bytes(data)
        return self.edit(*args)

    def with_R(self, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[object, ...]:
        changes = {name: Change({"R": change(c.factors["R"].clone())}) for name, c in self.good.changes.items()}
        Patch(**{**vars(self.good), "changes": changes}).save(self.patch)
        return self.apply()
