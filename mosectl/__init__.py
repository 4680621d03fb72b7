"""mosectl: edit facts in open language models with orthogonal, portable, revertible patches.

The same verbs as on the command line; names are imported when first used, so that `import mosectl` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mosectl._version import __version__

if TYPE_CHECKING:
    from mosectl.checkpoints.apply import apply as apply
    from mosectl.checkpoints.apply import revert as revert
    from mosectl.checkpoints.inspection import inspect as inspect
    from mosectl.checkpoints.live import ask as ask
    from mosectl.checkpoints.live import patched as patched
    from mosectl.editing.edit import EditResult as EditResult
    from mosectl.editing.edit import edit as edit
    from mosectl.editing.options import EditOptions as EditOptions
    from mosectl.errors import MosectlError as MosectlError
    from mosectl.facts.records import Fact as Fact
    from mosectl.facts.records import read_facts as read_facts
    from mosectl.measure.evaluate import Evaluation as Evaluation
    from mosectl.measure.evaluate import evaluate_edit as evaluate_edit
    from mosectl.measure.lm_harness import load_tasks as load_tasks
    from mosectl.model.loading import load as load
    from mosectl.patch.file import Patch as Patch
    from mosectl.render.console import progress as progress

_HOME = {
    "EditOptions": "editing.options", "EditResult": "editing.edit", "edit": "editing.edit", "MosectlError": "errors",
    "Fact": "facts.records", "read_facts": "facts.records", "inspect": "checkpoints.inspection", "ask": "checkpoints.live",
    "patched": "checkpoints.live", "load": "model.loading", "Patch": "patch.file", "apply": "checkpoints.apply",
    "revert": "checkpoints.apply", "Evaluation": "measure.evaluate", "evaluate_edit": "measure.evaluate",
    "load_tasks": "measure.lm_harness", "progress": "render.console",
}  # fmt: skip
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mosectl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mosectl.{_HOME[name]}"), name)
