"""Text a model writes by itself: the nearest thing to what it was trained on that everyone has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mosectl.errors import ModelError
from mosectl.forward import input_device

BATCH = 128  # samples written at once


@torch.no_grad()
def own_text(
    model: Any,
    tokenizer: Any,
    samples: int,
    *,
    tokens: int = 64,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Sample from the model's own distribution (temperature 1), each text from the token that begins a text, on one line.

    The same seed gives the same text on the same machine. Empty samples are left out.

    Raises:
        ModelError: the tokenizer has no token to begin with, or every sample is empty.
    """
    begin = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if begin is None:
        raise ModelError("its tokenizer has no token that begins or ends a text", fix="give a --corpus of your own")
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, begin) if t is not None)
    device = input_device(model)
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, samples, BATCH):
            ids = torch.full((min(BATCH, samples - start), 1), begin, device=device)
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=pad,
                do_sample=True, num_beams=1, temperature=1.0, top_p=1.0, top_k=0,
            )  # fmt: skip
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
            if on_step:
                on_step(start + len(ids), samples)
    lines = [line for text in texts if (line := " ".join(text.split()))]
    if not lines:
        raise ModelError("it writes nothing by itself", fix="give a --corpus of your own")
    return lines
