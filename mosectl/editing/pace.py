"""How fast this machine runs a model's layers: two of them without their weights' values, timed for a few seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.model.architecture import Architecture, resolve, skeleton
from mosectl.model.forward import Batch, attending, frozen, logits_at, open_outputs

LAYERS = 2  # of the model that is timed
ROWS, TOKENS = 8, 16  # of a batch
ASKED = 8  # positions of each row, where logits are timed
STEPS = 4  # tokens written one by one
LARGEST = 3e9  # parameters of a model whose layers are timed: ten seconds, and not many gigabytes
REPEATS = 3  # the faster counts: other work only ever slows


@dataclass(frozen=True)
class Pace:
    """Seconds: of a layer for a token, of the output embedding for a position, of a layer for a step of writing."""

    forward: float
    backward: float  # forward and backward
    head: float
    head_backward: float
    step: float  # for ROWS sequences at once
    exact: float  # one float64 operation of a product of matrices


def pace(whole: Any, device: str, dtype: torch.dtype) -> Pace:
    """Measure it on ``device`` for the layers of a model, of which only configuration and shapes are looked at."""
    if sum(p.numel() for p in whole.parameters()) > LARGEST:
        return _derived(whole, device, dtype)
    model = _shallow(whole.config, device, dtype)
    arch = resolve(model)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device=device)
    batch, every = Batch(ids, torch.ones_like(ids)), torch.arange(ASKED, device=device).expand(ROWS, -1)
    one = torch.zeros_like(every, dtype=torch.bool)
    one[0, 0] = True
    many = torch.ones_like(one)
    # As it is asked: with frozen weights PyTorch copies the output embedding for every row of a prompt's last states.
    written = _time(partial(_write, model, ids))
    with frozen(model):
        forward, whole = (_time(partial(_logits, model, batch, every, asked)) for asked in (one, many))
        backward, both = (_time(partial(_gradient, model, arch, batch, every, asked)) for asked in (one, many))
        n = ROWS * ASKED - 1
        head = max(0.0, whole - forward) / n
    step = written / STEPS - ROWS * head
    tokens = LAYERS * ROWS * TOKENS
    least = forward / tokens * ROWS
    return Pace(
        forward / tokens, max(forward, backward) / tokens, head, max(head, (both - backward) / n),
        max(step / LAYERS, least), _exact(device),
    )  # fmt: skip


def _derived(model: Any, device: str, dtype: torch.dtype) -> Pace:
    """Of a model whose layers would take minutes: from a product of matrices, of whose speed models reach a third."""
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    operation = 3 * _time(lambda: (a @ a).sum().item()) / (2 * 1024**3)
    layers = model.get_submodule(resolve(model).layers_path)
    layer = 2 * sum(p.numel() for p in layers.parameters()) / len(layers) * operation
    head = 2 * model.get_output_embeddings().weight.numel() * operation
    return Pace(layer, 2 * layer, head, 2 * head, ROWS * layer, _exact(device))


def _shallow(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """The model of ``config`` with LAYERS layers, every weight nothing."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = LAYERS
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(kinds := getattr(small, name, None), list):
            setattr(small, name, kinds[:LAYERS])
    model = skeleton(small).to(dtype).to_empty(device=device)
    for x in (*model.parameters(), *model.buffers()):
        x.data.zero_()
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, batch: Batch, positions: Tensor, asked: Tensor) -> object:
    with logits_at(model, positions, asked):
        return model(**batch.kwargs()).logits.sum().item()


def _gradient(model: nn.Module, arch: Architecture, batch: Batch, positions: Tensor, asked: Tensor) -> object:
    opened = open_outputs(model, arch.projections[:1], lambda k: k)
    with opened as (_, leaves), logits_at(model, positions, asked), torch.enable_grad(), attending(model, TOKENS):
        loss = model(**batch.kwargs()).logits.float().log_softmax(-1)[..., 0].sum()
        return torch.autograd.grad(loss, list(leaves.values()))[0].sum().item()


def _write(model: Any, ids: Tensor) -> object:
    """STEPS tokens one by one, without what the head costs."""
    return model.generate(
        input_ids=ids[:, :2], attention_mask=torch.ones_like(ids[:, :2]), max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def _time(work: Callable[[], object]) -> float:
    work()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _exact(device: str) -> float:
    a = torch.randn(768, 768, dtype=torch.float64).to("cpu" if device == "mps" else device)
    return _time(lambda: (a @ a).sum().item()) / (2 * 768**3)
