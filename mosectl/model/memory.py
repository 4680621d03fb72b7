"""How much fits in memory at once: batches for a backward pass, halved where the device has less than was thought."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from mosectl.model.architecture import Architecture

Part = TypeVar("Part")

LEAST = 2e9  # bytes that an edit may always use beside the weights
SHARE = 0.25  # of the weights' bytes that it may use where that is more: larger batches gain little
MOST = 8e9
FREE = 0.8  # of the memory that is free
ROWS = {"cpu": 32}  # sequences read at once: more gain nothing there, and progress would be told seldom
MOST_ROWS = 1024  # on any other device


def token_bytes(d: int, p: int, itemsize: int) -> int:
    """What a backward pass keeps of one token in one layer of hidden size d and FFN size p, in bytes.

    Seen in transformers' models (frozen weights, SDPA): 3p + 6.5d for Llama in bf16, whose norms keep float32; 3p + 10d for
    GPT-2.
    """
    return (3 * p + 8 * d) * itemsize


def logit_bytes(vocabulary: int) -> int:
    """What the loss of one position takes: logits, log-probabilities, their gradients, in float32."""
    return 5 * 4 * vocabulary


def work_bytes(weights: int, free: float = float("inf")) -> int:
    """Bytes that a backward pass may take beside ``weights`` bytes of weights, ``free`` bytes being free."""
    return int(min(max(LEAST, SHARE * weights), MOST, FREE * free))


def free_bytes(device: torch.device) -> int:
    """Bytes free on a device now, those that torch holds and does not use among them."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    return int(psutil.virtual_memory().available)


def fitting(model: nn.Module, arch: Architecture, first: int, tokens: float, positions: float) -> int:
    """How many sequences a backward pass down to layer ``first`` can take at once, at least 1.

    Args:
        tokens, positions: of one sequence; positions are those whose logits are asked.
    """
    p = arch.projections[0]
    parameters = list(model.parameters())
    weights = sum(w.numel() * w.element_size() for w in parameters)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    one = tokens * (len(arch.projections) - first) * token_bytes(p.d, p.p, parameters[-1].element_size())
    one += positions * logit_bytes(vocabulary)
    return max(1, int(work_bytes(weights, free_bytes(parameters[0].device)) / one))


def together(model: Any, tokens: int, positions: int) -> int:
    """How many sequences can be read at once without gradients, their keys and values kept; at least 1.

    Args:
        tokens, positions: of one sequence; positions are those whose logits are there at once.
    """
    config, parameters = model.config.get_text_config(), list(model.parameters())
    device, d, itemsize = parameters[0].device, config.hidden_size, parameters[-1].element_size()
    kept = 2 * config.num_hidden_layers * d * itemsize  # less where heads share keys and values
    one = tokens * (kept + token_bytes(d, 4 * d, itemsize)) + positions * logit_bytes(config.vocab_size)
    weights = sum(w.numel() * w.element_size() for w in parameters)
    fits = int(work_bytes(weights, free_bytes(device)) / one)
    return max(1, min(fits, ROWS.get(device.type, MOST_ROWS)))


def ran_out(e: RuntimeError) -> bool:
    """Is it torch's way to say that memory has run out?"""
    from accelerate.utils.memory import should_reduce_batch_size

    return bool(should_reduce_batch_size(e))


def halving(n: int, size: int, work: Callable[[int, int], Part]) -> Iterator[tuple[int, Part]]:
    """``work(start, end)`` on 0…n in parts of ``size``, halved whenever memory runs out; what is done stays done.

    Yields:
        (start, what the part came to).
    Raises:
        RuntimeError: torch's own, where not even a part of 1 fits.
    """
    from accelerate.utils.memory import clear_device_cache

    start = 0
    while start < n:
        end = min(start + size, n)
        try:
            done = work(start, end)
        except RuntimeError as e:
            if size == 1 or not ran_out(e):
                raise
            size = max(1, min(size, n - start) // 2)
        else:
            yield start, done
            start = end
            continue
        clear_device_cache(garbage_collection=True)  # out here: the error held on to what it had filled
