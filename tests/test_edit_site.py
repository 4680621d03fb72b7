"""Edit sites, dense and mixtures alike: read from disk and live, and one matrix while an edit is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mosectl.checkpoints.base import layout
from mosectl.model.architecture import resolve
from mosectl.model.loading import load
from mosectl.model.weights import set_weight, turns, weight_of, weights_of
from mosectl.storage.checkpoint import open_checkpoint
from support.mixtures import fused, logits
from support.models import save

KINDS = ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("model_type", KINDS)
def test_disk_and_live_model_hold_the_same(model_type: str, whole: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model_type)
    folder = fused(folder) if whole else folder
    checkpoint, model = open_checkpoint(folder), load(folder).model
    arch, names = layout(checkpoint)
    assert arch == resolve(model)
    for p in arch.projections:
        live = weights_of(model, p)
        for ours, theirs in zip(p.as_live([checkpoint.read(n) for n in names[p.name]]), live, strict=True):
            assert torch.equal(ours, theirs)
        assert p.representative(live[0]).dim() == 2
        assert p.fits(checkpoint.entry(names[p.name][0]).shape) and not p.fits((7, 7))


@pytest.mark.parametrize("model_type", KINDS)
def test_each_is_one_matrix_while_an_edit_is_made(model_type: str, tmp_path: Path) -> None:
    model = load(save(tmp_path / "m", model_type)).model
    arch, before = resolve(model), logits(model)
    for i, p in enumerate(arch.projections):
        with pytest.raises(ZeroDivisionError), turns(model, arch) as turned:
            one = turned.projections[i]
            assert torch.equal(logits(model), before) and one.single_matrix == p.single_matrix
            W = one.oriented(weight_of(model, one)).clone()
            assert W.shape == (one.d, one.p)
            set_weight(model, one, -W)
            assert not torch.allclose(logits(model), before)
            set_weight(model, one, W)
            raise ZeroDivisionError
        assert torch.equal(logits(model), before) and not model.get_submodule(p.name)._forward_hooks
