"""Weights that are no numbers: told before they are computed with, and refused before they are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosectl.errors import EditFailed, ModelError
from mosectl.patch.change import Change, changed


def is_finite(W: Tensor) -> bool:
    """No NaN and nothing infinite."""
    return not W.numel() or all(bool(torch.isfinite(x)) for x in torch.aminmax(W.detach()))


def check_weight(name: str, W: Tensor, where: str, *, zeros: bool = False) -> None:
    """Refuse a weight that cannot be edited.

    Args:
        zeros: all zeros are allowed.
    Raises:
        ModelError: it holds NaN or infinite numbers, or nothing but zeros.
    """
    if not is_finite(W):
        fix = "fetch the model again; in float16 try --dtype bfloat16"
        raise ModelError(f"'{name}' holds NaN or infinite numbers", where=where, fix=fix)
    if not zeros and not bool(W.any()):
        raise all_zeros(name, where)


def all_zeros(name: str, where: str) -> ModelError:
    """The error for a weight in which an edit has nothing to turn."""
    fix = "is the model whole? If it is, edit other --layers"
    return ModelError(f"'{name}' holds nothing but zeros", where=where, fix=fix)


def check_changed(name: str, W: Tensor, result: Tensor, changes: Sequence[Change], ids: Sequence[str] = ()) -> None:
    """Refuse what ``changes`` make of the finite W (d, p) where it is not finite in W's type.

    Args:
        ids: of the patches that the changes are from, for the message.
    Raises:
        EditFailed.
    """
    if is_finite(result):
        return
    steps = range(1, len(changes) + 1)
    at = next((n for n in steps if not is_finite(changed(changes[:n], W))), len(changes))
    what = f"patch {ids[at - 1][:12]}" if ids else "the edit"
    kind = str(W.dtype).removeprefix("torch.")
    fix = "do not use this patch" if kind == "float32" else f"do not use this patch, or a model in float32, not {kind}"
    raise EditFailed(f"{what} makes numbers that {kind} cannot hold", where=name, fix=fix)
