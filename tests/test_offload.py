"""Offloaded models: a change in memory would be lost there, so it is refused; on disk it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mosectl
from mosectl.checkpoints.apply import apply
from mosectl.checkpoints.live import patched
from mosectl.errors import ModelError
from mosectl.model.loading import load
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, save
from support.patches import patch_for

accelerate = pytest.importorskip("accelerate")
IDS = torch.tensor([[5, 9, 2, 31]])


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_no_edit_is_lost_silently(where: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch, plain = patch_for(base), load(base).model
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-6)
    with pytest.raises(ModelError, match="offloaded"), patched(model, patch):
        pass
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    with pytest.raises(ModelError, match="offloaded"):
        mosectl.edit(FACTS[:1], model, make_tokenizer(), options=few(str(corpus)))
    apply([patch], base, tmp_path / "out")
    with torch.no_grad(), patched(plain, patch):
        assert torch.equal(load(tmp_path / "out").model(IDS).logits, plain(IDS).logits)
