"""Solvers: from what an edited layer writes now and should write to a new weight. One file a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mosectl.errors import UsageError


@dataclass(frozen=True)
class LayerProblem:
    """One layer's part of an edit, in the y = W k orientation, all on one device."""

    S: Tensor  # (d, d) second moment of the layer's outputs W k over a corpus, E[y yᵀ]
    P: Tensor  # (d, d) sum of h hᵀ over the outputs of earlier edits, which must keep still
    H: Tensor  # (d, m) what the layer writes now at the facts' subjects, one column a context
    V: Tensor  # (d, m) what it should write
    weight: Tensor  # (m,) weight of each column; a fact's columns sum to 1
    options: dict[str, float] = field(default_factory=dict)


Solver = Callable[[LayerProblem], Tensor]


@dataclass(frozen=True)
class Method:
    """A registered solver: what it is called, on which side of W it works, and what it can be told."""

    name: str
    side: str
    source: str
    defaults: dict[str, float]
    solve: Solver


METHODS: dict[str, Method] = {}


def register(name: str, *, side: str, source: str, **defaults: float) -> Callable[[Solver], Solver]:
    """Class the decorated function as the solver of method ``name``."""

    def keep(solve: Solver) -> Solver:
        METHODS[name] = Method(name, side, source, defaults, solve)
        return solve

    return keep


def method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        UsageError: there is no such method.
    """
    from mosectl.solvers import mose  # noqa: F401  (registers itself)

    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'", fix=f"choose one of: {', '.join(sorted(METHODS))}")
    return METHODS[name]
