"""Quantised checkpoints: what a config.json says of them, and what to do instead of editing one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosectl.errors import ModelError

_BITS = ("bits", "nbits", "w_bit")
FIX = (
    "give the full checkpoint that it was made from: a patch for that one, exported with --to lora, "
    "is served on this one (docs/how-to/serve.md)"
)


def quantised(config: Any) -> str:
    """How the weights of a model are quantised, such as "gptq, 4 bits"; empty where they are not.

    Args:
        config: a config.json's content, or a PretrainedConfig.
    """
    found = _field(config, "quantization_config")
    if not found:
        return ""
    method = _field(found, "quant_method")
    name = str(getattr(method, "value", method) or type(found).__name__)[:40]
    bits = next((b for key in _BITS if type(b := _field(found, key)) is int), 0)
    bits = bits or 4 * bool(_field(found, "load_in_4bit")) or 8 * bool(_field(found, "load_in_8bit"))
    return f"{name}, {bits} bits" if bits else name


def refuse_quantised(config: Any, where: str) -> None:
    """Raises ModelError: the weights are quantised, so they can neither be turned nor be known by a patch."""
    if how := quantised(config):
        raise ModelError(f"its weights are quantised ({how})", where=where, fix=FIX)


def _field(of: Any, name: str) -> Any:
    return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)
