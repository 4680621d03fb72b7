"""Patches for serving: the same logits as the edited model, through PEFT, from a checkpoint and from llama.cpp's file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mosectl.checkpoints.export import LLAMA_CPP, RANKS, export
from mosectl.checkpoints.live import patched
from mosectl.errors import BaseMismatch, ModelError, OutputError, UsageError
from mosectl.model.architecture import MIXTURES, TABLE
from mosectl.model.loading import load
from mosectl.patch.file import Patch
from mosectl.storage.checkpoint import open_checkpoint
from support.commands import run
from support.models import save
from support.patches import added, hashes, patch_for, patches_of

IDS = torch.tensor([[5, 9, 2, 31, 7, 11, 3]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def expected(base: Path, patches: list[Patch]) -> torch.Tensor:
    loaded = load(base)
    with patched(loaded.model, *patches):
        return logits(loaded.model)


@pytest.mark.parametrize(  # patches of other kinds are made here for (d, p) weights only
    ("model_type", "kind"),
    [*(("llama", k) for k in ("compact", "dense", "additive")), *((t, "dense") for t in ("gpt2", "gpt_neox", "opt"))],
)
def test_peft_gives_the_edited_models_logits(kind: str, model_type: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base", model_type)
    patches = patches_of(kind, base)
    done = export(patches, base, tmp_path / "lora")
    assert done.rank in RANKS and done.left_out < 1e-6
    live = load(base).model
    before = logits(live)
    found = logits(peft.PeftModel.from_pretrained(live, tmp_path / "lora"))
    wanted = expected(base, patches)
    assert float((wanted - before).abs().max()) > 1e-3 and torch.allclose(found, wanted, atol=1e-5)
    merged = peft.PeftModel.from_pretrained(load(base).model, tmp_path / "lora").merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=1e-5)


def test_the_adapters_configuration(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    done = export(patches_of("compact", base), base, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank and config["target_modules"] == ["mlp.down_proj"]
    assert config["layers_to_transform"] == [0, 1] and not config["fan_in_fan_out"]
    # What vLLM asks besides (docs/how-to/serve.md); of the names of tensors it compares the last part of the module's.
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert config["use_dora"] is False and config["use_rslora"] is False and "rank_pattern" not in config
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.rsplit(".", 3)[1] for name in tensors} == {"down_proj"}
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {done.rank}
    card = (tmp_path / "lora" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and str(tmp_path) not in card
    assert f"--max-lora-rank {done.rank} --lora-modules" in card and "PeftModel.from_pretrained" in card
    with pytest.raises(OutputError, match="the output exists"):
        export(patches_of("compact", base), base, tmp_path / "lora")


def test_a_rank_that_cuts_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    done = export([patch], base, tmp_path / "small", rank=8)
    assert done.rank == 8 and 0.05 < done.left_out < 1
    assert done.smaller == (), "rank 1 would leave more than a tenth out"
    patch.save(tmp_path / "p")
    what = ("export", tmp_path / "p", "--model", base)
    assert run(*what, "-o", tmp_path / "lora", "--rank", 8) == 0
    told = capsys.readouterr()
    assert "of the change left out" in told.out and "smaller" not in told.err
    assert run(*what, "-o", tmp_path / "exact") == 0 and "exact" in capsys.readouterr().out
    assert run(*what, "-o", tmp_path / "x", "--to", "onnx") == 2


def test_smaller_ranks_that_lose_little_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    exact = export([patch], base, tmp_path / "exact")
    monkeypatch.setattr("mosectl.checkpoints.export.LITTLE", 1.0)
    patch.save(tmp_path / "p")
    done = export([patch], base, tmp_path / "all")
    assert done.rank == exact.rank and [k for k, _ in done.smaller] == [k for k in reversed(RANKS) if k < done.rank]
    for k, share in done.smaller:
        assert share == export([patch], base, tmp_path / str(k), rank=k).left_out
    assert run("export", tmp_path / "p", "--model", base, "-o", tmp_path / "lora") == 0
    (last, lost) = done.smaller[-1]
    assert last == 1 and f"--rank 1 would leave {lost:.1%} out" in capsys.readouterr().err


def test_a_rank_no_server_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base")
    monkeypatch.setattr("mosectl.checkpoints.export.RANKS", (1, 8))
    with pytest.raises(UsageError, match="exact only at rank") as e:
        export([patch_for(base)], base, tmp_path / "lora")
    assert "% of the change are left out), --to merged" in e.value.fix and not (tmp_path / "lora").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    other = replace(patch, base={m: replace(t, sha256="0" * 64) for m, t in patch.base.items()})
    for form in ("lora", "merged"):
        with pytest.raises(BaseMismatch):
            export([other], base, tmp_path / "out", form)
        assert not (tmp_path / "out").exists()


def test_a_merged_checkpoint_bears_no_trace(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    patches = patches_of("mixed", base)
    export(patches, base, tmp_path / "merged", "merged")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert "mosectl.json" not in names and "mosectl" not in names and "README.md" in names
    assert torch.equal(logits(load(tmp_path / "merged").model), expected(base, patches))
    assert hashes(tmp_path / "merged").keys() == open_checkpoint(base).tensors.keys()


def test_llama_cpps_file_holds_the_same_numbers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base = save(tmp_path / "base")
    patch = added(patch_for(base), base, 0)
    done = export([patch], base, tmp_path / "a.gguf", "gguf-lora")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert float(reader.fields["adapter.lora.alpha"].parts[-1][0]) == done.rank
    for module, change in patch.changes.items():
        layer = module.split(".")[2]
        a, b = found[f"blk.{layer}.ffn_down.weight.lora_a"], found[f"blk.{layer}.ffn_down.weight.lora_b"]
        assert torch.allclose(b @ a, change.factors["B"] @ change.factors["A"], atol=1e-4)
    with pytest.raises(OutputError, match="exists"):
        export([patch], base, tmp_path / "a.gguf", "gguf-lora")


LLAMA_CPPS = {  # transformers' model_type → llama.cpp's architecture, by its convert_hf_to_gguf.py
    "llama": "llama", "mistral": "llama", "ministral3": "mistral3", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3", "gemma4_text": "gemma4", "phi": "phi2", "phi3": "phi3",
    "cohere": "command-r", "cohere2": "cohere2", "glm": "chatglm", "glm4": "glm4", "olmo": "olmo", "olmo2": "olmo2",
    "olmo3": "olmo2", "gpt2": "gpt2", "gpt_bigcode": "starcoder", "starcoder2": "starcoder2", "gpt_neox": "gptneox",
    "bloom": "bloom", "falcon": "falcon", "mpt": "mpt", "stablelm": "stablelm", "nemotron": "nemotron",
    "granite": "granite", "smollm3": "smollm3", "exaone4": "exaone4", "apertus": "apertus", "arcee": "arcee",
}  # fmt: skip


@pytest.mark.parametrize("model_type", LLAMA_CPPS)
def test_llama_cpp_knows_the_architecture_and_the_tensors(model_type: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base = save(tmp_path / "base", model_type)
    patch = patch_for(base)
    export([patch], base, tmp_path / "a.gguf", "gguf-lora")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == LLAMA_CPPS[model_type]
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == LLAMA_CPPS[model_type])
    known = {
        f"{gguf.TENSOR_NAMES[t].format(bid=i)}.weight.lora_{x}" for t in gguf.MODEL_TENSORS[kind] for i in (0, 1, 2, 3)
        for x in "ab"
    }  # fmt: skip
    found = {t.name: tuple(t.shape) for t in reader.tensors}
    assert len(found) == 2 * len(patch.changes) and set(found) <= known
    assert all("ffn_down" in name for name in found)


def test_every_name_of_llama_cpps_is_one_it_has() -> None:
    gguf = pytest.importorskip("gguf")
    missing = {t: n for t, n in LLAMA_CPP.items() if n not in gguf.MODEL_ARCH_NAMES.values()}
    assert not missing and set(LLAMA_CPP) <= {*TABLE, *MIXTURES}
    unknown = {t for t in (*TABLE, *MIXTURES) if LLAMA_CPP.get(t, t) not in gguf.MODEL_ARCH_NAMES.values()}
    assert unknown == {"ministral", "codegen", "opt", "flex_olmo"}, "llama.cpp has no such models"


def test_an_architecture_unknown_to_llama_cpp_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = save(tmp_path / "base", "opt")
    with pytest.raises(ModelError, match="name for 'opt' is not known"):
        export([patch_for(base)], base, tmp_path / "a.gguf", "gguf-lora")
    assert not (tmp_path / "a.gguf").exists()
