"""Running a part of a model: replay what lies below a layer, stop above one, compute only the logits that are asked.

Everything goes through the model's own forward, so masks, rotary phases, embeddings and soft-capping stay the
library's business; hooks and temporary replacements are always undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mosectl.errors import NotFinite
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids: a causal model never looks at what stands to the right."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], device: torch.device | str) -> Batch:
        """Token sequences of any lengths, padded to the longest."""
        longest = max(len(s) for s in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        return Batch(ids.to(device), mask.to(device))

    def rows(self, index: Tensor) -> Batch:
        """The sequences of these indices."""
        return Batch(self.input_ids[index], self.attention_mask[index])

    def kwargs(self) -> dict[str, Any]:
        """What a model's forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}


def by_length(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of the sequences in batches of at most ``batch_tokens``, those of like length together: less padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if not batches or (len(batches[-1]) + 1) * len(sequences[i]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


class _Stop(Exception):
    """Raised inside a hook once the last layer that is needed has run."""


def input_device(model: nn.Module) -> torch.device:
    """Where token ids must be for this model, also when it is split over several devices."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.weight.device


def finite(values: Tensor, model: nn.Module) -> Tensor:
    """The logits (or other numbers, (…, n)) that a model gave, as they are; a single −inf is a token ruled out.

    Raises:
        NotFinite: some are NaN or infinite.
    """
    if bool(torch.isfinite(values.detach().amax(-1)).all()):  # the maximum is NaN where one of them is
        return values
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    fix = "are its weights whole? fetch the model again"
    if dtype == "float16":
        fix = "use bfloat16: --dtype bfloat16 (float16 ends at 65,504), or float32"
    raise NotFinite(f"the model's numbers are not finite in {dtype}", fix=fix)


def layer_modules(model: nn.Module, arch: Architecture) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_submodule(arch.layers_path)  # type: ignore[return-value]


def by_row(x: Tensor, batch_size: int) -> Tensor:
    """(B, T, n), also where a model flattens its tokens (OPT)."""
    return x if x.dim() == 3 else x.view(batch_size, -1, x.shape[-1])


def ffn_output(out: Tensor, module: nn.Module, batch_size: int) -> Tensor:
    """W k of a projection's output W k + b, as (B, T, d): the bias does not turn with W."""
    out = by_row(out, batch_size)
    bias = module.bias
    return out - bias if isinstance(bias, Tensor) else out


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hook handles whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights, no dropout; both restored afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)


SHORT = 64  # tokens up to which plain attention is the faster one there, forward and backward


@contextmanager
def attending(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside the block sequences of so many tokens, if gradients are taken through them, are attended to by plain products
    of matrices where PyTorch's fused attention is slow: on a CPU its backward pass in bfloat16 takes the same for any
    length (torch 2.13; at 20 tokens nine tenths of it are for nothing, docs/LOG.md).
    """
    kind = next(model.parameters())
    slow = kind.device.type == "cpu" and kind.dtype in (torch.bfloat16, torch.float16)
    with sdpa_kernel(SDPBackend.MATH) if slow and tokens <= SHORT and torch.is_grad_enabled() else nullcontext():
        yield


@contextmanager
def logits_at(model: nn.Module, positions: Tensor, asked: Tensor | None = None) -> Iterator[None]:
    """Inside the block the model computes its logits at ``positions`` (B, m) only: (B, m, V).

    Args:
        asked: (B, m) bool; only where it is true, row by row: (1, K, V).
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # (B, T, d)
        index = positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
        return (hidden if asked is None else hidden[asked.to(hidden.device)][None], *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    with hooked([head.register_forward_pre_hook(gather)]):
        yield


def keys_at(model: nn.Module, projections: Sequence[Projection], batch: Batch, positions: Tensor) -> list[Tensor]:
    """Each FFN's inner activation k at one token a row: a list of (B, p) float32; the forward stops at the last one.

    Args:
        positions: (B,) token index in each row.
    """
    found: dict[str, Tensor] = {}
    last = max(projections, key=lambda p: p.layer)
    rows, end = torch.arange(len(positions)), int(positions.max()) + 1
    batch = Batch(batch.input_ids[:, :end], batch.attention_mask[:, :end])  # what comes later cannot matter

    def record(projection: Projection) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            k = by_row(args[0], len(positions))
            found[projection.name] = k[rows.to(k.device), positions.to(k.device)].float()
            if projection is last:
                raise _Stop

        return hook

    run_until_stopped(model, batch, [(p.name, record(p)) for p in projections])
    return [found[p.name] for p in projections]


@contextmanager
def open_outputs(
    model: nn.Module, projections: Sequence[Projection], read: Callable[[Tensor], Tensor]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inside the block a zero is added to what each projection writes: a leaf, whose gradient is that of the output.

    Yields:
        what ``read`` keeps of each projection's input, and the leaves, both by module path, once the model has run.
    """
    inputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def opened(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            inputs[name], leaves[name] = read(args[0].detach()), torch.zeros_like(out, requires_grad=True)
            return out + leaves[name]

        return hook

    with hooked([model.get_submodule(p.name).register_forward_hook(opened(p.name)) for p in projections]):
        yield inputs, leaves


def hidden_at(model: nn.Module, arch: Architecture, layer: int, batch: Batch, positions: Tensor) -> Tensor:
    """The hidden state that decoder layer ``layer`` hands on, at one token a row: (B, d) float32."""
    return output_at(model, f"{arch.layers_path}.{layer}", batch, positions)


def output_at(model: nn.Module, name: str, batch: Batch, positions: Tensor) -> Tensor:
    """What the module ``name`` puts out at one token a row: (B, d) float32."""
    found: list[Tensor] = []
    rows = torch.arange(len(positions))

    def hook(_: nn.Module, __: Any, out: Any) -> None:
        h = by_row(out[0] if isinstance(out, tuple | list) else out, len(positions))
        found.append(h[rows.to(h.device), positions.to(h.device)].float())
        raise _Stop

    run_until_stopped(model, batch, [(name, hook)])
    return found[0]


stop = _Stop


@torch.no_grad()
def run_until_stopped(model: nn.Module, batch: Batch, hooks: Sequence[tuple[str, Callable[..., None]]]) -> None:
    """One forward with forward hooks on named modules; a hook may raise to stop it."""
    with hooked([model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks]), suppress(_Stop):
        model(**batch.kwargs())
