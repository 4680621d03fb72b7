"""What a config.json may claim: a model is built from it, layer by layer, before a weight is seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from mosectl.errors import ModelError

MAX_COUNT = 100_000  # layers, heads or experts of one kind
MAX_WEIGHTS = 20_000  # of a model whose weight files are not at hand; the largest have some thousand
_COUNT = re.compile(r"(?:layers?|heads?|experts|blocks|depth)$")


def check_counts(content: Any) -> None:
    """Refuse numbers of layers, heads or experts from which configs would make lists that fill the memory.

    Raises:
        ModelError.
    """
    for name, value in content.items():
        if isinstance(value, Mapping):
            check_counts(value)
        elif type(value) is int and value > MAX_COUNT and _COUNT.search(str(name)):
            what = f"'{name}' is {value:,}: no model has as many"
            raise ModelError(what, where="config.json", fix="fetch the model again")


@contextmanager
def at_most(tensors: int | None) -> Iterator[None]:
    """Stop a model's building where it gets many more weights than the files hold ``tensors``; None: not at hand.

    Several weights may come out of one tensor, and parts of a model may have none there (a vision tower).

    Raises:
        ModelError.
    """
    limit, made = MAX_WEIGHTS if tensors is None else 4 * tensors + 1000, 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > limit:
            what = f"claims more weights than the model's files hold (stopped at {limit:,})"
            raise ModelError(what, where="config.json", fix="fetch the model again")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
