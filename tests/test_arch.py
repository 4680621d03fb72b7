"""Every dense row of the table: found, and rotating what was found rotates what the layer writes."""

from __future__ import annotations

import pytest
import torch
from conftest import pico, save
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mosectl.arch import TABLE, disk_names, resolve, skeleton
from mosectl.checkpoint import open_checkpoint
from mosectl.errors import ModelError
from mosectl.forward import Batch, Suffix, ffn_output, outputs_at
from mosectl.rotation import nearest_rotation, rotate

EXPECTED = {
    "gpt2": ("transformer.h.1.mlp.c_proj", True, True),
    "gpt_bigcode": ("transformer.h.1.mlp.c_proj", False, True),
    "starcoder2": ("model.layers.1.mlp.c_proj", False, True),
    "gptj": ("transformer.h.1.mlp.fc_out", False, True),
    "codegen": ("transformer.h.1.mlp.fc_out", False, True),
    "gpt_neox": ("gpt_neox.layers.1.mlp.dense_4h_to_h", False, True),
    "bloom": ("transformer.h.1.mlp.dense_4h_to_h", False, True),
    "falcon": ("transformer.h.1.mlp.dense_4h_to_h", False, False),
    "opt": ("model.decoder.layers.1.fc2", False, True),
    "phi": ("model.layers.1.mlp.fc2", False, True),
    "mpt": ("transformer.blocks.1.ffn.down_proj", False, False),
    "gemma3": ("model.language_model.layers.1.mlp.down_proj", False, False),
}
POST = {"gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3", "exaone4"}
DENSE = sorted(TABLE)


def build(model_type: str):
    try:
        return pico(model_type)
    except (ValueError, KeyError) as e:
        if "nrecognized" in str(e) or model_type in str(e):
            pytest.skip(f"this transformers has no {model_type}")
        raise


@pytest.mark.parametrize("model_type", DENSE)
def test_dense(model_type: str) -> None:
    model = build(model_type)
    arch = resolve(model)
    name, transposed, bias = EXPECTED.get(model_type, ("model.layers.1.mlp.down_proj", False, False))
    p = arch.projections[1]
    assert arch.listed and len(arch.projections) == 3
    assert (p.name, p.transposed, p.bias) == (name, transposed, bias)
    assert p.d == 32 and p.oriented(model.get_submodule(p.name).weight).shape == (32, p.p)
    assert (arch.post_norm is not None) == (model_type in POST or model_type == "glm4")
    if arch.post_norm:
        assert hasattr(model.get_submodule(f"{arch.layers_path}.0"), arch.post_norm)
    bones = resolve(skeleton(model.config.to_dict()))
    assert bones.projections == arch.projections

    module = model.get_submodule(p.name)
    R = nearest_rotation(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    k = torch.randn(2, 5, p.p)
    before = ffn_output(module(k), module, 2)
    with torch.no_grad():
        module.weight.copy_(p.stored(rotate(R, p.oriented(module.weight))))
    after = ffn_output(module(k), module, 2)
    assert torch.allclose(after, before @ R.T.float(), atol=1e-4)


@pytest.mark.parametrize("model_type", DENSE)
def test_partial_forward(model_type: str) -> None:
    model = build(model_type)
    arch = resolve(model)
    batch = Batch.of([[1, 5, 9, 30, 44], [1, 7, 8]], "cpu")
    with torch.no_grad():
        full = model(**batch.kwargs()).logits
    positions = torch.tensor([[3, 4], [1, 2]])
    got = Suffix(model, arch, 1, batch).logits(torch.tensor([0, 1]), positions)
    wanted = full.gather(1, positions[..., None].expand(-1, -1, full.shape[-1]))
    assert torch.allclose(got, wanted, atol=1e-4)
    found = outputs_at(model, arch.projections, batch, torch.tensor([4, 2]))
    assert len(found) == 3 and found[0].shape == (2, 32) and float(found[2].norm()) > 0
    with torch.no_grad():
        assert torch.equal(model(**batch.kwargs()).logits, full), "hooks were left behind"


def test_square_conv1d_is_told_by_its_class() -> None:
    model = pico("gpt2", n_inner=32)
    p = resolve(model).projections[0]
    assert p.d == p.p == 32 and p.transposed
    W = torch.arange(6.0).view(2, 3)
    assert torch.equal(p.stored(p.oriented(W)), W)


def test_unlisted_model_is_found_by_structure() -> None:
    model = pico("llama")
    model.config.model_type = "llama_of_tomorrow"
    arch = resolve(model)
    assert not arch.listed and arch.projections[2].name == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "phimoe", "deepseek_v3"])
def test_experts_are_refused(model_type: str) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    config = AutoConfig.for_model(model_type, **small, moe_intermediate_size=16, first_k_dense_replace=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"mixture-of-experts.*experts"):
        resolve(model)


def test_other_kinds_are_refused() -> None:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    with pytest.raises(ModelError, match="encoder-decoder"):
        resolve(T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)))
    with pytest.raises(ModelError, match="bert"):
        resolve(BertLMHeadModel(BertConfig(**small, is_decoder=True)))
    with pytest.raises(ModelError, match="no single FFN output projection"):
        resolve(skeleton({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50}))


def test_quantised_and_wrapped_models_are_refused() -> None:
    model = pico("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="gptq"):
        resolve(model)
    model = pico("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ModelError, match=r"layers.1.mlp.down_proj is a .*Sequential"):
        resolve(model)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "no_such_thing"}, "no_such_thing"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.y"}}, "remote code is never run"),
        ({"hidden_size": 3}, "not known"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "llama", "hidden_size": "many"}, "config.json"),
    ],
)
def test_bad_configs(config: dict, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        skeleton(config)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3"])
def test_names_on_disk(model_type: str, tmp_path) -> None:
    folder = save(tmp_path, model_type)
    checkpoint = open_checkpoint(folder)
    arch = resolve(skeleton(checkpoint.config))
    names = disk_names(arch, checkpoint.tensors)
    for p in arch.projections:
        assert checkpoint.entry(names[p.name]).shape[0 if not p.transposed else 1] == p.d


def test_names_with_other_prefixes() -> None:
    arch = resolve(pico("gpt2"))
    plain = [f"h.{i}.mlp.c_proj.weight" for i in range(3)]
    assert disk_names(arch, plain)["transformer.h.2.mlp.c_proj"] == "h.2.mlp.c_proj.weight"
    with pytest.raises(ModelError, match=r"no tensor 'transformer.h.2.*\n.*nearest"):
        disk_names(arch, plain[:2])
    with pytest.raises(ModelError, match="may be any of"):
        disk_names(arch, [*plain, "other.h.0.mlp.c_proj.weight"])
