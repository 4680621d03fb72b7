"""Mixtures of experts: one rotation turns the output of a whole block, every expert and the shared one alike.

A block writes y = Σ_e g_e W_e k_e (+ g_s W_s k_s) with gates g that the rotation does not touch, so R y is the output of
the same block with R W_e in place of every W_e. To the solvers a block is one projection whose W is the identity and
whose keys are y: while an edit is made, a "turn" R stands behind the block; a patch multiplies the experts by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosectl.errors import ModelError
from mosectl.model.edit_site import DiskNames, Projection

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_TURN = "turn"
# Experts are stored one by one (``experts.3.down_proj``, Mixtral's ``experts.3.w2``) or all in one tensor.
_ON_DISK = re.compile(
    r"\w+\.(?:experts\.(\d+)\.(?:down_proj|w2)\.weight|(experts)\.down_proj|"
    rf"(?:{'|'.join(SHARED)})\.down_proj\.weight)"
)


class Turn(nn.Module):
    """y ↦ R y, in float32 whatever the model's type."""

    bias = None

    def __init__(self, d: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d, device=device), requires_grad=False)  # (d, d)

    def forward(self, y: Tensor) -> Tensor:
        """R y for outputs y (…, d), in their own type."""
        return (y.float() @ self.weight.T).to(y.dtype)


def block_name(name: str) -> str:
    """The module that a patch names: a turn's block, any other module itself."""
    return name.removesuffix(f".{_TURN}")


@dataclass(frozen=True)
class Mixture(Projection):
    """A block of experts, and perhaps a shared one, all of whose output matrices one rotation turns."""

    @property
    def weight_name(self) -> str:
        return f"{block_name(self.name)}.experts.0.down_proj.weight"

    @property
    def single_matrix(self) -> bool:
        return False

    @property
    def described(self) -> str:
        return f"{self.experts} experts, one rotation ({self.d}, {self.d})"

    def fits(self, shape: Sequence[int]) -> bool:
        return self.d in shape and len(shape) in (2, 3)

    def tensor_names(self, disk: DiskNames) -> tuple[str, ...]:
        parts: dict[str, list[str]] = {}  # "0", "1", …, "all", "shared" → the tensors that claim to be it
        for end, names in disk.of_layer(self.layer).items():
            if fits := _ON_DISK.fullmatch(end):
                part = fits[1] or ("all" if fits[2] else "shared")
                parts.setdefault(part, []).extend(names)
        each = ["all"] if "all" in parts else [str(i) for i in range(self.experts)]
        needed = each + (["shared"] if self.shared else [])
        wrong = [part for part in needed if len(parts.get(part, [])) != 1] + sorted(set(parts) - set(needed))
        if wrong:
            raise ModelError(
                f"the experts of '{self.name}' are not {self.experts}{' and a shared one' * bool(self.shared)}: "
                f"missing, twice or too many: {', '.join(wrong[:5])}",
                where="checkpoint",
                fix="is this checkpoint complete?",
            )
        return tuple(parts[part][0] for part in needed)

    def live_weights(self, model: nn.Module) -> list[Tensor]:
        """The experts' (experts, d, p) and the shared one's (d, p)."""
        block = model.get_submodule(self.name)
        found = [block.experts.down_proj]  # type: ignore[union-attr]
        if self.shared:
            found.append(block.get_submodule(self.shared).weight)
        return found  # type: ignore[return-value]

    def as_live(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if tensors[0].dim() == 3:
            return list(tensors)
        return [torch.stack(list(tensors[: self.experts])), *tensors[self.experts :]]

    def representative(self, weight: Tensor) -> Tensor:
        return weight[0]

    @contextmanager
    def as_one_matrix(self, model: nn.Module) -> Iterator[Projection]:
        block = model.get_submodule(self.name)
        block.add_module(_TURN, Turn(self.d, next(block.parameters()).device))
        handle = block.register_forward_hook(lambda block, _, y: block.get_submodule(_TURN)(y))
        try:
            name = f"{self.name}.{_TURN}"
            yield Turned(self.layer, name, self.d, self.p, False, False, self.experts, self.shared)
        finally:
            handle.remove()
            delattr(block, _TURN)


@dataclass(frozen=True)
class Turned(Mixture):
    """A mixture with a turn behind it: in the live model its weight is the turn's."""

    def live_weights(self, model: nn.Module) -> list[Tensor]:
        return [model.get_submodule(self.name).weight]  # type: ignore[list-item]

    def representative(self, weight: Tensor) -> Tensor:
        return weight
