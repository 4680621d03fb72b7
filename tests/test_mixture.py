"""Mixtures of experts: one rotation for all experts of a layer, live and on disk, in every way they are stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mosectl
from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.audit import blame, verify
from mosectl.checkpoints.export import export
from mosectl.checkpoints.live import patched
from mosectl.editing.diagnosis import diagnose
from mosectl.errors import BaseMismatch, ModelError, UsageError
from mosectl.linalg.rotation import nearest_rotation
from mosectl.measure.evaluate import evaluate_edit
from mosectl.model.architecture import MIXTURES, disk_names, resolve
from mosectl.model.loading import load
from mosectl.model.weights import turns, weights_of
from mosectl.storage.checkpoint import open_checkpoint
from support.facts import CORPUS, FACTS, FEW
from support.mixtures import fused, logits
from support.models import make_tokenizer, pico, save
from support.patches import hashes, patch_for

KINDS = [
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v3",
]  # w2; down_proj; a gated shared expert; a dense first layer


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return str(tmp_path / "corpus.txt")


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_turning_every_expert_turns_the_block(model_type: str) -> None:
    model = pico(model_type)
    arch = resolve(model)
    assert any(p.experts == 4 for p in arch.projections) and arch.listed
    p = arch.projections[-1]
    R = nearest_rotation(torch.randn(p.d, p.d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    with turns(model, arch) as turned, torch.no_grad():
        plain = logits(model)
        model.get_submodule(turned.projections[-1].name).weight.copy_(R)
        behind = logits(model)
    assert torch.equal(plain, logits(model)), "the turn must be gone"
    with torch.no_grad():
        for w in weights_of(model, p):
            w.copy_(R.float() @ w)
    inside = logits(model)
    assert (inside - behind).norm() < 1e-5 * inside.norm() and (inside - plain).norm() > 0.01 * inside.norm()


@pytest.mark.parametrize("form", ["one by one", "in one tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_apply_and_revert(model_type: str, dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    whole = form == "in one tensor"
    base = save(tmp_path / "base", model_type, dtype, "1GB" if whole else "20KB")
    base = fused(base) if whole else base
    original, patch = hashes(base), patch_for(base, layers=(1, 2))
    done = apply([patch], base, tmp_path / "out")
    p = resolve(pico(model_type)).projections[2]
    changed = {n for n, h in hashes(tmp_path / "out").items() if h != original[n]}
    assert len(changed) == 2 * ((1 if whole else 4) + bool(p.shared)) and {t.tensor for t in done.tensors} == changed
    assert all(t.exact and t.stability and t.stability.norm_drift < 3e-3 for t in done.tensors)
    assert all(c.ok for c in verify(tmp_path / "out"))

    live, edited = load(base, dtype="auto").model.to(dtype), load(tmp_path / "out").model.to(dtype)
    with patched(live, patch):
        for ours, theirs in zip(weights_of(live, p), weights_of(edited, p), strict=True):
            assert torch.equal(ours, theirs)
        R = patch.changes[p.name].factors["R"]
        fresh = load(base).model
        assert (weights_of(live, p)[0][3].float() - R @ weights_of(fresh, p)[0][3].float()).norm() < 3e-2
    assert revert(patch, tmp_path / "out").restored and hashes(tmp_path / "out") == original


def test_a_stack_comes_off_in_any_order_and_moves_between_forms(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "qwen2_moe", torch.bfloat16, "20KB")
    a, b = patch_for(base, (0, 1), 1), patch_for(base, (1, 2), 2)
    one = fused(save(tmp_path / "one", "qwen2_moe", torch.bfloat16))
    apply([a, b], base, tmp_path / "out")
    apply([a, b], one, tmp_path / "whole")  # made for experts one by one: the same weights
    assert torch.equal(logits(load(tmp_path / "out").model), logits(load(tmp_path / "whole").model))
    revert(a, tmp_path / "out")
    assert all(c.ok for c in verify(tmp_path / "out"))
    apply([b], base, tmp_path / "only")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "only")
    (tmp_path / "only" / "mosectl.json").unlink()
    report = revert(b, tmp_path / "only", tmp_path / "back")  # without a journal: Rᵀ
    assert len(report.tensors) == 10 and (logits(load(tmp_path / "back").model) - logits(load(base).model)).norm() < 0.5


@pytest.mark.parametrize("method", ["isospectral", "mose", "oft"])
@pytest.mark.parametrize("model_type", KINDS)
def test_edit_changes_the_answer(model_type: str, method: str, corpus: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model_type)
    layers = range(model_type == "deepseek_v3", 3)  # its first one is dense
    own = {"steps_oft": 200, "rate": 0.02} if method == "oft" else FEW.solver
    options = replace(FEW, corpus=corpus, method=method, layers=",".join(map(str, layers)), solver=own)
    result = mosectl.edit(FACTS[:1], folder, options=options, refuse=False)
    (fact,) = result.facts
    assert fact.probability_after > 10 * fact.probability_before and fact.after.startswith("and")
    assert set(result.patch.changes) == {f"model.layers.{i}.mlp" for i in layers} and result.patch.side == "output"
    assert max(s.spectrum_drift for s in result.stability) < 1e-5
    result.patch.save(tmp_path / "p.safetensors")
    patch = mosectl.Patch.load(tmp_path / "p.safetensors")
    apply([patch], folder, tmp_path / "out")
    with patched(live := load(folder).model, patch):
        assert torch.allclose(logits(live), logits(load(tmp_path / "out").model), atol=1e-5)
    _, (moved,) = blame([FACTS[0]["prompt"]], tmp_path / "out", max_new_tokens=3)
    assert moved.moved_by == (patch.id,) and moved.answers[1].startswith("and")
    told = evaluate_edit(tmp_path / "out", FACTS[:1], protocols=["generation"], text=corpus)
    assert told.subject.base and told.facts[0].after == fact.after and told.facts[0].before == fact.before


def test_the_model_in_memory_is_left_as_it_was(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("qwen2_moe")
    before = {n: p.clone() for n, p in model.named_parameters()}
    options = replace(FEW, corpus=corpus, layers="1,2")
    mosectl.edit(FACTS[:1], model, make_tokenizer(), options=options, refuse=False)
    monkeypatch.setattr("mosectl.editing.edit.Session.edit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mosectl.edit(FACTS[:1], model, make_tokenizer(), options=options)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in after.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_done_is_refused(corpus: str, tmp_path: Path) -> None:
    options = replace(FEW, corpus=corpus, layers="1,2")
    with pytest.raises(UsageError, match="adds to one matrix") as e:
        mosectl.edit(FACTS, pico("mixtral"), make_tokenizer(), options=replace(options, method="memit", solver={}))
    assert "model.layers.1.mlp" in str(e.value)
    with pytest.raises(UsageError, match="in one edit"):
        mosectl.edit(FACTS, pico("deepseek_v3"), make_tokenizer(), options=replace(options, layers="0,1"))
    base = save(tmp_path / "base", "mixtral")
    with pytest.raises(UsageError, match="mixture of experts"):
        export([patch_for(base)], base, tmp_path / "lora", "lora")
    with pytest.raises(BaseMismatch, match="sha256 differs"):
        apply([patch_for(base)], _other(tmp_path / "other"), tmp_path / "x")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts of 'model.layers.1.mlp' are not 4: missing, twice or too many: 2"):
        apply([patch_for(save(tmp_path / "whole", "mixtral"))], base, tmp_path / "x")


def _other(folder: Path) -> Path:
    save(folder, "mixtral")
    tensors = {n: t + 0.01 for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_doctor_tells_what_is_turned(tmp_path: Path) -> None:
    base = save(tmp_path / "m", "qwen2_moe")
    d = diagnose(base)
    assert any("3 layers are mixtures of 4 experts" in n for n in d.notes) and not d.problems
    assert d.tensors[1][0] == "model.layers.1.mlp.experts.0.down_proj.weight"
    names = list(open_checkpoint(base).tensors)
    twice = [*names, "other." + names[names.index(d.tensors[0][0])]]
    with pytest.raises(ModelError, match="twice"):
        disk_names(d.architecture, twice)
    assert json.loads((base / "config.json").read_text())["model_type"] == "qwen2_moe"
