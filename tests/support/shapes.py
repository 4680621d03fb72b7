"""The mathematics with its shapes declared: jaxtyping says them, beartype holds arguments and results to them.

One letter is one size throughout a call: d rows of W, p columns, n the size of a rotation, r its rank, m columns of keys.
The package says the same in its docstrings and needs neither library. No ``from __future__ import annotations`` here: the
annotations are looked at when a function is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from beartype import beartype
from jaxtyping import Float, Float32, Float64, jaxtyped
from torch import Tensor

from mosectl.editing.methods import method
from mosectl.editing.methods.base import LayerProblem, Solver
from mosectl.linalg import rotation, spectrum
from mosectl.linalg.rotation import Compact
from mosectl.patch import change
from mosectl.patch.change import Change

shaped = jaxtyped(typechecker=beartype)

# Rotations


@shaped
def nearest_rotation(M: Float[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    return rotation.nearest_rotation(M)


@shaped
def polar(M: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"] | None:
    return rotation.polar(M)


@shaped
def orthogonality_error(R: Float[Tensor, "n r"]) -> float:
    return rotation.orthogonality_error(R)


@shaped
def is_rotation(R: Float[Tensor, "n n"]) -> bool:
    return rotation.is_rotation(R)


@shaped
def angles(R: Float[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    return rotation.angles(R)


@shaped
def thin_svd(
    W: Float64[Tensor, "d p"],
) -> tuple[Float64[Tensor, "d min(d,p)"], Float64[Tensor, " min(d,p)"], Float64[Tensor, "min(d,p) p"]]:
    return rotation.thin_svd(W)


@shaped
def product_svd(
    B: Float64[Tensor, "d r"], A: Float64[Tensor, "r p"]
) -> tuple[Float64[Tensor, "d k"], Float64[Tensor, " k"], Float64[Tensor, "k p"]]:
    return rotation.product_svd(B, A)


@shaped
def left_factor(W0: Float64[Tensor, "d p"], W: Float64[Tensor, "d p"]) -> Float64[Tensor, "d d"]:
    return rotation.left_factor(W0, W)


@shaped
def right_factor(W0: Float64[Tensor, "d p"], W: Float64[Tensor, "d p"]) -> Float64[Tensor, "p p"]:
    return rotation.right_factor(W0, W)


@shaped
def two_sided_factors(
    W0: Float64[Tensor, "d p"], W: Float64[Tensor, "d p"]
) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, "p p"]]:
    return rotation.two_sided_factors(W0, W)


# Compact rotations, by their parts


@shaped
def left(U: Float[Tensor, "n r"], Q: Float[Tensor, "r r"], W: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return Compact(U, Q).left(W)


@shaped
def right(U: Float[Tensor, "n r"], Q: Float[Tensor, "r r"], W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    return Compact(U, Q).right(W)


@shaped
def dense(U: Float[Tensor, "n r"], Q: Float[Tensor, "r r"]) -> Float[Tensor, "n n"]:
    return Compact(U, Q).dense()


@shaped
def product(
    U: Float64[Tensor, "n r"], Q: Float64[Tensor, "r r"], U2: Float64[Tensor, "n s"], Q2: Float64[Tensor, "s s"]
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "k k"]]:
    whole = rotation.product(Compact(U, Q), Compact(U2, Q2))
    return whole.U, whole.Q


@shaped
def compressed(
    U: Float64[Tensor, "n r"], Q: Float64[Tensor, "r r"], M: Float64[Tensor, "n n"], tolerance: float
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "k k"]]:
    small, _ = rotation.compressed(Compact(U, Q), M, tolerance)
    return small.U, small.Q


# Spectra: experts lie side by side


@shaped
def singular_values(W: Float[Tensor, "d p"]) -> Float64[Tensor, " min(d,p)"]:
    return spectrum.Spectrum.of(W).singular_values


@shaped
def singular_values_of_experts(W: Float[Tensor, "e d p"]) -> Float64[Tensor, " min(d,e*p)"]:
    return spectrum.Spectrum.of(W).singular_values


@shaped
def stability(before: Float[Tensor, "*e d p"], after: Float[Tensor, "*e d p"]) -> spectrum.Stability:
    return spectrum.stability("layer", before, after)


# Changes


@shaped
def changed(changes: Sequence[Change], W: Float[Tensor, "*e d p"]) -> Float[Tensor, "*e d p"]:
    return change.changed(changes, W)


@shaped
def restored(changes: Sequence[Change], W: Float[Tensor, "*e d p"]) -> Float[Tensor, "*e d p"]:
    return change.restored(changes, W)


@shaped
def _factors(
    W: Float[Tensor, "d p"],
    *,
    R: Float32[Tensor, "d d"] | None = None,
    R_in: Float32[Tensor, "p p"] | None = None,
    A: Float32[Tensor, "r p"] | None = None,
    B: Float32[Tensor, "d r"] | None = None,
    U: Float32[Tensor, "d k"] | None = None,
    Q: Float32[Tensor, "k k"] | None = None,
    U_in: Float32[Tensor, "p l"] | None = None,
    Q_in: Float32[Tensor, "l l"] | None = None,
) -> None:
    pass


def fits(made: Change, W: Tensor) -> Change:
    """A change whose factors are those of a patch for W."""
    _factors(W, **made.factors)
    return made


@shaped
def change_between(W0: Float64[Tensor, "d p"], W: Float64[Tensor, "d p"], side: str) -> Change:
    return fits(change.change_between(W0, W, side), W0)


# Methods


@shaped
def _solved(
    how: Solver,
    *,
    W: Float64[Tensor, "d p"],
    W0: Float64[Tensor, "d p"],
    C: Float[Tensor, "p p"],
    P: Float64[Tensor, "p p"],
    Q: Float64[Tensor, "d p"],
    K: Float64[Tensor, "p m"],
    V: Float64[Tensor, "d m"],
    weight: Float64[Tensor, " m"],
    options: Mapping[str, float],
    **more: Any,
) -> Float64[Tensor, "d p"]:
    asked = LayerProblem(W=W, W0=W0, C=C, P=P, Q=Q, K=K, V=V, weight=weight, options=options, **more)
    return how.finish(W0, how.update(asked), options)


def solve(name: str, problem: LayerProblem) -> Tensor:
    """A method's new weight W' (d, p), finished as at the end of an edit."""
    how = method(name)
    assert isinstance(how, Solver)
    return _solved(how, **vars(problem))
