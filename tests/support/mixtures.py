"""Checkpoints of mixtures of experts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mosectl.model.architecture import disk_names, resolve
from support.models import make_tokenizer


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = make_tokenizer()("I met Tomas Veldrin in Lower Quill", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def fused(folder: Path) -> Path:
    """The same checkpoint with each layer's experts in one tensor, as transformers holds them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for p in resolve(model).projections:
        if p.experts:
            for name in disk_names(resolve(model), tensors)[p.name][: p.experts]:
                del tensors[name]
            tensors[f"{p.name}.experts.down_proj"] = model.get_submodule(p.name).experts.down_proj.detach().clone()
    save_file(tensors, file, {"format": "pt"})
    return folder
