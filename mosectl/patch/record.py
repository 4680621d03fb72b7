"""What a patch's record holds of its base and its facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
KEY = "mosectl"
HOLDS = ("changed", "already known")  # statuses of a fact that the edited model says


@dataclass(frozen=True)
class BaseTensor:
    """What one edited weight was before the edit."""

    tensor: str  # weight name in the model, e.g. "model.layers.5.mlp.down_proj.weight"; of a mixture the first expert's
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", "F16", "F32"
    sha256: str  # of the raw bytes
    sample: tuple[float, ...]  # evenly spaced entries: recognises the same weights in another dtype

    def to_record(self) -> dict[str, Any]:
        """As a patch's record has it."""
        return {
            "tensor": self.tensor, "shape": self.shape, "dtype": self.dtype, "sha256": self.sha256, "sample": self.sample,
        }  # fmt: skip

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
    target_aliases: tuple[str, ...] = ()  # other right answers; in the record only if there are any
    right_after: str | None = None  # the answer right after its batch; in the record only of runs in several batches

    @property
    def targets(self) -> tuple[str, ...]:
        """All right answers, the new object first."""
        return (self.target_new, *self.target_aliases)

    def to_record(self) -> dict[str, Any]:
        """As a patch's record has it."""
        space = self.space_before_target
        return {
            "prompt": self.prompt, "subject": self.subject, "target_new": self.target_new, "before": self.before,
            "after": self.after, "probability_before": self.probability_before,
            "probability_after": self.probability_after, "status": self.status, "wordings": self.wordings,
            **({} if space is None else {"space_before_target": space}),
            **({"target_aliases": self.target_aliases} if self.target_aliases else {}),
            **({} if self.right_after is None else {"right_after": self.right_after}),
        }  # fmt: skip

    @staticmethod
    def of(entry: Mapping[str, Any]) -> PatchFact:
        """From a record's entry."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        return PatchFact(**values)
