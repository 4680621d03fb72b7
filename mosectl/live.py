"""Loaded models: load one, patch it in memory, ask it with a patch on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.arch import Projection, resolve, skeleton
from mosectl.change import Change, changed
from mosectl.checkpoint import Checkpoint, check_generation_config, open_checkpoint
from mosectl.errors import BaseMismatch, ModelError, Notice, UsageError
from mosectl.evaluate import generate
from mosectl.fingerprint import match
from mosectl.finite import check_changed, check_weight
from mosectl.patch import Patch
from mosectl.positions import note_prompts
from mosectl.readiness import check_ready, quiet
from mosectl.share import local
from mosectl.stack import check_stack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and the checkpoint it came from."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint | None  # None for a model that was handed over in memory


def load(model: str | Path, *, revision: str | None = None, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a causal language model for editing or asking.

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda:1", …, or "balanced" to spread it over all GPUs.
        dtype: "auto" keeps the checkpoint's type on a GPU and takes float32 on a CPU, where half precision is slow.
    Raises:
        ModelError, HubError, UsageError.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(model, revision)
    skeleton(checkpoint.config, len(checkpoint.tensors))  # what config.json claims is built by transformers otherwise
    check_generation_config(checkpoint.folder)
    device = pick_device(device)
    kind = pick_dtype(dtype, device)
    tokenizer = check_ready(checkpoint)
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


def note_chat(tokenizer: Any, chat: bool) -> None:
    """A hint where a model that may be one for chats is asked without its template."""
    if not chat and getattr(tokenizer, "chat_template", None):
        what = "the tokenizer has a chat template: a model that was trained for chats is asked and edited with --chat"
        warnings.warn(what, Notice, stacklevel=2)


def pick_dtype(dtype: str, device: str) -> torch.dtype | str:
    """The type to load weights in: a torch dtype, or "auto" for the checkpoint's own."""
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"--dtype {dtype}: no such type", fix=f"choose auto, {', '.join(DTYPES)}")
    if dtype == "float16" and device == "cpu":
        warnings.warn("float16 is slow on a CPU: bfloat16 or float32 take less time", Notice, stacklevel=2)
    return DTYPES.get(dtype, torch.float32 if device == "cpu" else "auto")


def pick_device(device: str) -> str:
    """Resolve "auto" and refuse a device that is not here.

    Raises:
        UsageError.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    known = {"cpu": True, "balanced": torch.cuda.is_available(), "cuda": torch.cuda.is_available()}
    known["mps"] = torch.backends.mps.is_available()
    if kind not in known:
        raise UsageError(f"--device {device}: no such device", fix="choose auto, cpu, cuda, cuda:1, mps or balanced")
    if not known[kind]:
        raise UsageError(f"--device {device}: there is none here", fix="choose --device cpu")
    return device


def solve_device(device: torch.device) -> torch.device:
    """Where float64 work for weights on ``device`` is done: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The live weight of one projection that is a matrix (or a mixture's turn).

    Raises:
        ModelError: it is offloaded, where a change in place would be lost.
    """
    return _here(model.get_submodule(projection.name).weight, projection)  # type: ignore[arg-type]


def weights_of(model: nn.Module, projection: Projection) -> list[Tensor]:
    """The live weights of one projection: its matrix, or the experts' (experts, d, p) and the shared one's (d, p).

    Raises:
        ModelError: they are offloaded.
    """
    if not projection.experts:
        return [weight_of(model, projection)]
    block = model.get_submodule(projection.name)
    found = [block.experts.down_proj]  # type: ignore[union-attr]
    if projection.shared:
        found.append(block.get_submodule(projection.shared).weight)
    return [_here(w, projection) for w in found]  # type: ignore[arg-type]


def _here(weight: Tensor, projection: Projection) -> Tensor:
    if weight.is_meta:
        raise ModelError("the weight is offloaded", where=projection.name, fix="load the model without offloading")
    return weight


def as_live(projection: Projection, stored: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a checkpoint, in the order of ``arch.disk_names``, as the live model holds them: experts in one tensor."""
    if not projection.experts or stored[0].dim() == 3:
        return list(stored)
    return [torch.stack(list(stored[: projection.experts])), *stored[projection.experts :]]


def set_weight(model: nn.Module, projection: Projection, W: Tensor) -> None:
    """Set a live weight to W (d, p), rounded once to the model's type."""
    with torch.no_grad():
        weight_of(model, projection).copy_(projection.stored(W))


@contextmanager
def patched(model: nn.Module, *patches: Patch, force: bool = False) -> Iterator[nn.Module]:
    """The model with ``patches`` applied in order inside the block; afterwards every weight is bit for bit what it was.

    Args:
        force: skip the check that the patches were made for this model.
    Raises:
        BaseMismatch: a patch was made for other weights. ModelError, EditFailed: as :func:`changes_on`.
    """
    projections = {p.name: p for p in resolve(model).projections}  # type: ignore[arg-type]
    changes: dict[str, list[Change]] = {}
    ids: dict[str, list[str]] = {}
    for patch in patches:
        for module, change in patch.changes.items():
            if module not in projections:
                raise BaseMismatch(f"no module '{module}' in this model", fix="give the model the patch is for")
            if not force:
                weight = weights_of(model, projections[module])[0]
                _check(patch, module, weight if not patch.parents else None)
            changes.setdefault(module, []).append(change)
            ids.setdefault(module, []).append(patch.id)
    with changes_on(model, [(projections[module], stacked) for module, stacked in changes.items()], ids):
        yield model


@contextmanager
def changes_on(
    model: nn.Module,
    changes: Sequence[tuple[Projection, Sequence[Change]]],
    ids: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[None]:
    """The model with each projection's weights changed inside the block, rounded once from what they were.

    Args:
        ids: by module path, of the patches that its changes are from.
    Raises:
        ModelError: a weight is not finite. EditFailed: it would not be so any more.
    """
    known = ids or {}
    with exchanged(
        (weight, p.stored(_changed(p, weight.detach(), stacked, known.get(p.name, ()))))
        for p, stacked in changes
        for weight in weights_of(model, p)
    ):
        yield


def _changed(p: Projection, weight: Tensor, changes: Sequence[Change], ids: Sequence[str]) -> Tensor:
    W = p.oriented(weight)
    check_weight(p.weight_name, W, "the loaded model", zeros=True)
    result = changed(changes, W)
    check_changed(p.weight_name, W, result, changes, ids)
    return result


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Each live weight with another value inside the block, afterwards bit for bit what it was.

    Args:
        pairs: weight and value, taken one after the other: of values that are computed only one is there at a time.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, value in pairs:
                before.append((weight, weight.detach().clone()))
                weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for weight, old in before:
                weight.copy_(old)


def _check(patch: Patch, module: str, weight: Tensor | None) -> None:
    found = match(patch.base[module], weight) if weight is not None else None
    if found and not found.same:
        raise BaseMismatch(
            f"the patch is for {patch.model}: {found.note}", where=module, fix="give that model, or force=True"
        )


def load_patches(paths: Sequence[str | Path]) -> list[Patch]:
    """Read patch files (or hf://user/repo, downloaded) in the order given."""
    return [Patch.load(local(p)) for p in paths]


@dataclass(frozen=True)
class Asked:
    """One prompt and its greedy continuations."""

    prompt: str
    before: str
    after: str | None  # with the patches on; None when there are none


def ask(
    prompts: Sequence[str],
    model: str | Path,
    patches: Sequence[Patch] = (),
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    chat: bool = False,
    max_new_tokens: int = 20,
    force: bool = False,
) -> list[Asked]:
    """Greedy continuations of ``prompts`` without and with ``patches``.

    Raises:
        ModelError, BaseMismatch, HubError, UsageError.
    """
    if patches and not force:
        check_stack(open_checkpoint(model, revision), patches)
    loaded = load(model, revision=revision, device=device, dtype=dtype)
    note_chat(loaded.tokenizer, chat)
    note_prompts(loaded.model, loaded.tokenizer, prompts, chat)

    def answers() -> list[str]:
        return generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat)

    before, after = answers(), None
    if patches:
        with patched(loaded.model, *patches, force=True):  # checked above, against the files
            after = answers()
    return [Asked(p, before[i], after[i] if after else None) for i, p in enumerate(prompts)]
