"""Solvers: from the keys an edited layer sees and what it should write for them to a new weight. One file a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor

from mosectl.errors import UsageError
from mosectl.model.architecture import Projection
from mosectl.model.moe import block_name

NAMES = (
    *("isospectral", "mose", "oft", "rome", "memit", "rect", "emmet", "prune", "alphaedit"),
    *("horse", "malmen", "horse-isospectral"),
)

# Where a solver's values come from; the first two can be asked for by their number (EditOptions.aim).
KINDS = (
    "layer",  # a target for each edited layer's output
    "spread",  # one residual at the topmost edited layer, shared out among them (MEMIT)
    "fit",  # none are needed: it trains on the model
)


# What the additive methods have in common as published: targets of any length, one solve, no care for earlier edits.
PUBLISHED = {"sphere": 0, "rounds": 1, "protect": 0.0}


@dataclass(frozen=True)
class LayerProblem:
    """One layer's part of an edit, in the y = W k orientation, float64 and on one device but for C."""

    W: Tensor  # (d, p) the weight as it is now
    W0: Tensor  # (d, p) the weight before any edit of this run
    C: Tensor  # (p, p) second moment of the layer's keys over a corpus, E[k kᵀ]; any type, on any device: see kept()
    P: Tensor  # (p, p) sum of k kᵀ over earlier edits, which must keep still
    Q: Tensor  # (d, p) sum of v kᵀ over earlier edits, v being what the layer wrote when they were made
    K: Tensor  # (p, m) the facts' keys, one column a context
    V: Tensor  # (d, m) what the layer should write for them
    weight: Tensor  # (m,) weight of each column; a fact's columns sum to 1
    options: Mapping[str, float] = field(default_factory=dict)
    name: str = ""  # the layer's module path
    keep: float = 1.0  # scales C

    def kept(self, scale: float = 1.0) -> Tensor:
        """A new (p, p) ``scale``·``keep``·C like W: gigabytes in a large model, so made where it is used and only once."""
        return self.C.to(self.W, copy=True).mul_(scale * self.keep)


Solver = Callable[[LayerProblem], Tensor]  # → W' (d, p) float64
Finish = Callable[[Tensor, Tensor, Mapping[str, float]], Tensor]  # (W0, W, options) → W', once at the end
Fit = Callable[..., dict[str, Tensor]]  # as solvers/oft.py: trains on the model itself → W' by module path


@dataclass(frozen=True)
class Method:
    """A registered solver: what it is called, how it changes W, and what it can be told."""

    name: str
    side: str  # what its patches hold, a key of change.SIDES
    source: str
    kind: str  # where values come from, one of KINDS
    defaults: Mapping[str, float]
    run: Any  # a Solver, or a Fit where kind is "fit"
    settings: Mapping[str, Any]  # defaults of the edit and its targets that differ from the general ones
    finish: Finish | None = None
    trained: str = ""  # the method for which an editor must be trained that this one needs

    def form(self, asked: str) -> str:
        """The form of rotations that is sought, ``asked`` being one of options.FORMS.

        A trained network's update is of high rank: looking for a low one by itself would take minutes and find none.
        """
        return "dense" if self.trained and asked == "auto" else asked

    def needs_moments(self, form: str) -> bool:
        """Statistics over a corpus are of use to it (to a rotation that trains on the model: for its compact form)."""
        return self.kind != "fit" or (self.side != "additive" and self.form(form) != "dense")

    def solve(self, problem: LayerProblem) -> Tensor:
        """The new weight W' (d, p) of one layer."""
        return self.run(problem)


METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    side: str,
    source: str,
    kind: str = "layer",
    settings: Mapping[str, Any] | None = None,
    finish: Finish | None = None,
    trained: str = "",
    **defaults: float,
) -> Callable[[Any], Any]:
    """Class the decorated function as the solver of method ``name``; ``defaults`` are its own options."""

    def keep(run: Any) -> Any:
        METHODS[name] = Method(name, side, source, kind, defaults, run, settings or {}, finish, trained)
        return run

    return keep


def method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        UsageError: there is no such method.
    """
    if name not in NAMES:
        raise UsageError(f"unknown method '{name}'", fix=f"choose one of: {', '.join(NAMES)}")
    import_module(f"mosectl.editing.methods.{name.replace('-', '_')}")  # registers itself
    return METHODS[name]


def patch_side(solver: Method, projections: Sequence[Projection]) -> str:
    """What the patch holds: a mixture of experts can only be turned, and from the output side.

    Raises:
        UsageError: the method, or these layers together, cannot do that.
    """
    mixed = [p for p in projections if p.experts]
    if not mixed:
        return solver.side
    where = block_name(mixed[0].name)
    if solver.side == "additive":
        fix = "use --method isospectral or mose"
        raise UsageError(f"'{solver.name}' adds to one matrix, a mixture of experts has many", where=where, fix=fix)
    if len(mixed) < len(projections) and solver.side != "output":
        what = "layers that are mixtures of experts and layers that are not, in one edit"
        raise UsageError(what, where=where, fix="choose --layers of one kind, or --method mose")
    return "output"
