"""An edit site: what an edit changes in one layer, in a live model and on disk. A single matrix, or a mixture (moe.py).

Callers treat both alike: they ask a site for its weights, give it new ones, and never ask which kind it is.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from mosectl.errors import ModelError


@dataclass(frozen=True)
class DiskNames:
    """A checkpoint's tensor names, by layer.

    Checkpoints drop or add leading parts ("transformer.", "model.", "language_model."): what counts is what follows the
    layer's number.
    """

    every: Collection[str]
    layers_path: str  # of the list of layers in the live model
    inside: Mapping[str, Mapping[str, Sequence[str]]]  # "3" → "mlp.down_proj.weight" → names that end so

    @classmethod
    def of(cls, layers_path: str, names: Collection[str]) -> DiskNames:
        stem, inside = layers_path.rsplit(".", 1)[-1], dict[str, dict[str, list[str]]]()
        for name in names:
            parts = name.split(".")
            for at in (i for i, part in enumerate(parts[:-2]) if part == stem):
                inside.setdefault(parts[at + 1], {}).setdefault(".".join(parts[at + 2 :]), []).append(name)
        return cls(names, layers_path, inside)

    def of_layer(self, layer: int) -> Mapping[str, Sequence[str]]:
        return self.inside.get(str(layer), {})


@dataclass(frozen=True)
class Projection(ABC):
    """One layer's FFN output projection, y = W k (+ b) with W (d, p): an edit site.

    Of a mixture of experts: the whole block, whose output y one rotation turns, as if by an identity W (d, d) behind it.
    """

    layer: int
    name: str  # module path
    d: int  # hidden size
    p: int  # FFN width; of a mixture d
    transposed: bool  # stored as (p, d), as GPT-2's Conv1D
    bias: bool
    experts: int = 0  # how many there are in a mixture
    shared: str = ""  # path, inside the block, of the projection of experts that every token passes

    @property
    @abstractmethod
    def weight_name(self) -> str:
        """The weight that a patch knows its base by; of a mixture the first expert's."""

    @property
    @abstractmethod
    def single_matrix(self) -> bool:
        """Can something be added to its weight, and its input be turned? The matrices of a mixture share one rotation."""

    @property
    @abstractmethod
    def described(self) -> str:
        """Its shape in words."""

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """May the first of its tensors on disk have this shape?"""

    @abstractmethod
    def tensor_names(self, disk: DiskNames) -> tuple[str, ...]:
        """The tensors on disk that hold its weights: one, or a mixture's experts in order and the shared one.

        Raises:
            ModelError: a tensor is missing, or several fit.
        """

    @abstractmethod
    def live_weights(self, model: nn.Module) -> list[Tensor]:
        """Its parameters in a loaded model."""

    @abstractmethod
    def as_live(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors read from disk, in the order of :meth:`tensor_names`, as :meth:`live_weights` has them."""

    @abstractmethod
    def representative(self, weight: Tensor) -> Tensor:
        """The matrix that stands for the site in a patch's record; ``weight`` is the first of :meth:`live_weights`."""

    @abstractmethod
    def as_one_matrix(self, model: nn.Module) -> AbstractContextManager[Projection]:
        """Inside the block a site of the model with the same effect whose weight is one (d, p) matrix that can be set."""

    @property
    def stored_shape(self) -> tuple[int, int]:
        return (self.p, self.d) if self.transposed else (self.d, self.p)

    def oriented(self, W: Tensor) -> Tensor:
        """The stored weight as (d, p); several experts' in one tensor are (experts, d, p) already."""
        return W.T if self.transposed else W

    def stored(self, W: Tensor) -> Tensor:
        """A (d, p) weight as it is stored."""
        return W.T.contiguous() if self.transposed else W


@dataclass(frozen=True)
class Dense(Projection):
    """One matrix."""

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def single_matrix(self) -> bool:
        return True

    @property
    def described(self) -> str:
        return f"W ({self.d}, {self.p})" + (", stored transposed (Conv1D)" if self.transposed else "")

    def fits(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == self.stored_shape

    def tensor_names(self, disk: DiskNames) -> tuple[str, ...]:
        end = self.weight_name.removeprefix(f"{disk.layers_path}.{self.layer}.")
        found = disk.of_layer(self.layer).get(end, [])
        if self.weight_name in found:
            return (self.weight_name,)
        if len(found) == 1:
            return (found[0],)
        if found:
            what = f"'{self.weight_name}' may be any of: {', '.join(sorted(found))}"
            raise ModelError(what, where="checkpoint", fix="keep one set of layers in the folder")
        near = difflib.get_close_matches(self.weight_name, list(disk.every), n=1)
        hint = f"the nearest name is '{near[0]}'" if near else "is this checkpoint complete?"
        raise ModelError(f"no tensor '{self.weight_name}'", where="checkpoint", fix=hint)

    def live_weights(self, model: nn.Module) -> list[Tensor]:
        return [model.get_submodule(self.name).weight]  # type: ignore[list-item]

    def as_live(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def representative(self, weight: Tensor) -> Tensor:
        return weight

    def as_one_matrix(self, model: nn.Module) -> AbstractContextManager[Projection]:
        return nullcontext(self)
