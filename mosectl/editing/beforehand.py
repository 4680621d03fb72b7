"""What an edit can be refused for before the model's weights are loaded, which takes minutes for a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mosectl.editing.layers import named_layers, settled
from mosectl.editing.methods import method
from mosectl.editing.options import EditOptions
from mosectl.editing.replies import replies_settled
from mosectl.editing.resume import Progress, belongs
from mosectl.errors import UsageError
from mosectl.facts.records import Fact
from mosectl.hypernetwork.file import Editor
from mosectl.model.architecture import Architecture, resolve
from mosectl.model.positions import fitted, window


@dataclass
class Beforehand:
    """The check that is handed to the loader; afterwards it holds the facts that the model can read, and settled options."""

    facts: list[Fact]
    options: EditOptions
    trained: Editor | None
    progress: Progress | None
    on_error: str

    def __call__(self, model: Any, tokenizer: Any) -> None:
        """Check facts, layers and what an interrupted run has left against a model, which needs no weights for it.

        Raises:
            ModelError, FactsError, UsageError, BaseMismatch. OutputError: the interrupted run was another one.
        """
        arch = resolve(model)
        self.facts = fitted(self.facts, tokenizer, window(model), chat=self.options.chat, on_error=self.on_error)
        options = self.options = replies_settled(
            settled(self.options, len(arch.projections), len(self.facts)), tokenizer
        )
        layers = chosen_beforehand(arch, options, self.trained)
        if self.trained:
            dense = {p.name: model.get_parameter(p.weight_name) for p in arch.projections if p.single_matrix}
            if any(weight.is_meta for weight in dense.values()):  # with weights more is said of them, and later
                self.trained.check(dense)
        if layers is not None:
            method(options.method).side_on([p for p in arch.projections if p.layer in layers])
        if self.progress:
            self.progress.check(belongs(self.facts, options, layers))


def chosen_beforehand(arch: Architecture, options: EditOptions, trained: Editor | None) -> Sequence[int] | None:
    """The layers that will be edited; None where how they answer to the facts will decide.

    Args:
        options: settled.
    Raises:
        UsageError: layers that the model does not have, or any beside an editor.
    """
    if trained is None:
        return named_layers(options, arch)
    if options.layers != "auto":
        raise UsageError("--layers: an editor edits the layers it was trained for", fix="leave --layers out")
    return tuple(p.layer for p in arch.projections if p.single_matrix and p.name in trained.modules)
