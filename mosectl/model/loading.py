"""Loading a model and its tokenizer: where it goes, in which dtype, and what is refused before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mosectl.errors import ModelError, Notice, UsageError
from mosectl.model.architecture import skeleton
from mosectl.model.readiness import check_ready, load_tokenizer
from mosectl.storage.checkpoint import Checkpoint, check_generation_config, locate, open_checkpoint, read_config
from mosectl.storage.quiet import quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Check = Callable[[Any, Any], None]  # of a model without weights (on meta) and its tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and the checkpoint it came from."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint | None  # None for a model that was handed over in memory


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: Check | None = None,
) -> Loaded:
    """Load a causal language model for editing or asking.

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda:1", …, or "balanced" to spread it over all GPUs.
        dtype: "auto" keeps the checkpoint's type; on a CPU only bfloat16, and only where it multiplies bfloat16 (the
            avx512_bf16 or amx_bf16 of recent ones, several times as fast there), and takes float32 otherwise.
        check: called with the model as config.json has it, without weights, and its tokenizer, before any weight is fetched
            or read: what it raises costs no time.
    Raises:
        ModelError, HubError, UsageError.
    """
    from transformers import AutoModelForCausalLM

    check_where(device, dtype)
    if check and not Path(model).is_dir():  # so that nothing large is downloaded for what will be refused
        folder, _, revision = locate(model, revision, weights=False)
        check(skeleton(read_config(folder)), load_tokenizer(folder))
        check = None
    checkpoint = open_checkpoint(model, revision)
    # What config.json claims is built by transformers otherwise.
    meta_model = skeleton(checkpoint.config, len(checkpoint.tensors))
    check_generation_config(checkpoint.folder)
    device = pick_device(device)
    kind = pick_dtype(dtype, device, checkpoint.config)
    tokenizer = check_ready(checkpoint)
    if check:
        check(meta_model, tokenizer)
    placed = {"device_map": device if device == "balanced" else {"": device}}
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=kind, trust_remote_code=False, use_safetensors=True, **placed
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        first = (str(e).strip() or type(e).__name__).split("\n")[0]
        raise ModelError(f"cannot be loaded: {first}", where=str(model), fix="run: mosectl doctor MODEL") from e
    return Loaded(loaded.eval(), tokenizer, checkpoint)


def check_where(device: str, dtype: str = "auto") -> None:
    """What can be told of a place and a type without a model, before anything is read or fetched.

    Raises:
        UsageError: there is no such device here, or no such type.
    """
    pick_device(device)
    _check_dtype(dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"--dtype {dtype}: no such type", fix=f"choose auto, {', '.join(DTYPES)}")


def pick_dtype(dtype: str, device: str, config: Mapping[str, Any]) -> torch.dtype:
    """The type to load the weights of a model in that has this ``config.json``.

    Raises:
        UsageError.
    """
    _check_dtype(dtype)
    if dtype == "float16" and device == "cpu":
        warnings.warn("float16 is slow on a CPU: bfloat16 or float32 take less time", Notice, stacklevel=2)
    stored = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    if device == "cpu" and not (stored == torch.bfloat16 and _multiplies_bfloat16()):
        stored = torch.float32
    return DTYPES.get(dtype, stored)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which are emulated in float32 otherwise."""
    has: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # an older PyTorch does not tell, which is a no
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def pick_device(device: str) -> str:
    """Resolve "auto" and refuse a device that is not here.

    Raises:
        UsageError.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, colon, number = device.partition(":")
    known = {"cpu": True, "balanced": torch.cuda.is_available(), "cuda": torch.cuda.is_available()}
    known["mps"] = torch.backends.mps.is_available()
    if kind not in known or (colon and not number.isdecimal()):
        raise UsageError(f"--device {device}: no such device", fix="choose auto, cpu, cuda, cuda:1, mps or balanced")
    if not known[kind] or (kind == "cuda" and colon and int(number) >= torch.cuda.device_count()):
        raise UsageError(f"--device {device}: there is none here", fix="choose --device cpu")
    return device
