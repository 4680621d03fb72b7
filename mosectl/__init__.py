"""mosectl: edit facts in open language models with orthogonal, portable, revertible patches.

The same verbs as on the command line; names are imported when first used, so that `import mosectl` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mosectl.editor import EditResult as EditResult
    from mosectl.editor import edit as edit
    from mosectl.errors import MosectlError as MosectlError
    from mosectl.evaluation import Evaluation as Evaluation
    from mosectl.evaluation import evaluate_edit as evaluate_edit
    from mosectl.facts import Fact as Fact
    from mosectl.facts import read_facts as read_facts
    from mosectl.inspection import inspect as inspect
    from mosectl.live import ask as ask
    from mosectl.live import load as load
    from mosectl.live import patched as patched
    from mosectl.options import EditOptions as EditOptions
    from mosectl.patch import Patch as Patch
    from mosectl.stack import apply as apply
    from mosectl.stack import revert as revert

_HOME = {
    "EditOptions": "options", "EditResult": "editor", "edit": "editor", "MosectlError": "errors", "Fact": "facts",
    "read_facts": "facts", "inspect": "inspection", "ask": "live", "load": "live", "patched": "live", "Patch": "patch",
    "apply": "stack", "revert": "stack", "Evaluation": "evaluation", "evaluate_edit": "evaluation",
}  # fmt: skip
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mosectl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mosectl.{_HOME[name]}"), name)
