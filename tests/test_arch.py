"""Every dense row of the table: found, and rotating what was found rotates what the layer writes."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mosectl.errors import ModelError
from mosectl.linalg.rotation import nearest_rotation
from mosectl.model.architecture import MIXTURES, TABLE, disk_names, resolve, skeleton
from mosectl.model.edit_site import Projection
from mosectl.model.forward import Batch, ffn_output, hooked, keys_at, layer_modules
from mosectl.model.partial_forward import Below, Past, Suffix
from mosectl.storage.checkpoint import open_checkpoint
from support.models import pico

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
    "gemma4": ("model.language_model.layers.1.mlp.down_proj", False, False),
}
POST = {
    **dict.fromkeys(
        ["gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "olmo2", "olmo3", "exaone4"],
        "post_feedforward_layernorm",
    ),
    "glm4": "post_mlp_layernorm",
}
DENSE = sorted(TABLE)


def build(model_type: str, **variant):
    try:
        return pico(model_type, **variant)
    except (ValueError, KeyError) as e:
        if "nrecognized" in str(e) or model_type in str(e):
            pytest.skip(f"this transformers has no {model_type}")
        raise


def turn_and_compare(model: torch.nn.Module, p: Projection) -> None:
    """Rotating the projection rotates what it writes; the bias stays."""
    module = model.get_submodule(p.name)
    R = nearest_rotation(torch.randn(p.d, p.d, generator=torch.Generator().manual_seed(1)))
    k = torch.randn(2, 5, p.p)
    before = ffn_output(module(k), module, 2)
    with torch.no_grad():
        module.weight.copy_(p.stored(R.to(module.weight) @ p.oriented(module.weight)))
    after = ffn_output(module(k), module, 2)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(after, before @ R.T.float(), atol=1e-4)


@pytest.mark.parametrize("model_type", DENSE)
def test_dense(model_type: str) -> None:
    model = build(model_type)
    arch = resolve(model)
    name, transposed, bias = EXPECTED.get(model_type, ("model.layers.1.mlp.down_proj", False, False))
    p = arch.projections[1]
    assert arch.listed and len(arch.projections) == len(model.get_submodule(arch.layers_path)) >= 3
    assert [q.layer for q in arch.projections] == list(range(len(arch.projections)))
    assert (p.name, p.transposed, p.bias) == (name, transposed, bias)
    assert p.d == 32 and p.oriented(model.get_submodule(p.name).weight).shape == (32, p.p)
    assert arch.post_norm == POST.get(model_type)
    if arch.post_norm:
        assert hasattr(model.get_submodule(f"{arch.layers_path}.0"), arch.post_norm)
    assert resolve(skeleton(model.config.to_dict())) == arch
    turn_and_compare(model, p)


WINDOWS = ["mistral", "gemma2", "gemma3_text", "cohere2", "olmo3", "exaone4", "starcoder2"]
VARIANTS: list[tuple[str, dict]] = [
    *((t, {}) for t in [*DENSE, *sorted(MIXTURES)]),
    *((t, {"sliding_window": 3}) for t in WINDOWS),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("opt", {"do_layer_norm_before": False}),
    ("openai-gpt", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),  # its layers return lists
]


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_partial_forward(model_type: str, variant: dict) -> None:
    model = build(model_type, **variant)
    arch = resolve(model)
    batch = Batch.of([[1, 5, 9, 30, 44, 7, 3, 99], [1, 7, 8], [1, 9, 3, 44, 2]], "cpu")
    with torch.no_grad():
        full = model(**batch.kwargs()).logits
    still = torch.tensor([3, 1, 0])
    for first, past in itertools.product(range(len(arch.projections)), (None, still)):
        suffix = Suffix(model, arch, first, batch, past)
        serves = past is not None and model_type != "openai-gpt"  # which has no cache
        assert bool(suffix.offset.any()) == serves, "the past must serve every other model"
        for rows in (torch.tensor([0, 1, 2]), torch.tensor([2]), torch.tensor([1, 2])):
            positions = torch.tensor([[3, 7], [1, 2], [0, 4]])[rows]
            asked = torch.tensor([[True, True], [False, True], [True, False]])[rows]
            wanted = full[rows[:, None], positions][asked]
            assert torch.allclose(suffix.logits(rows, positions, asked), wanted, atol=1e-4), (first, rows)
    with torch.no_grad():
        assert torch.equal(model(**batch.kwargs()).logits, full), "hooks were left behind"


def test_a_model_that_cannot_use_a_past_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, still = Batch.of([[1, 5, 9, 30, 44, 7, 3, 99], [1, 7, 8]], "cpu"), torch.tensor([3, 1])
    for spoil in (lambda *_: 1 / 0, lambda *_: {"input_ids": batch.input_ids[:, 2:], "use_cache": False}):
        model = build("llama")
        arch = resolve(model)
        with monkeypatch.context() as m:
            m.setattr(Past, "kwargs", spoil)
            suffix = Suffix(model, arch, 1, batch, still)
        assert not suffix.offset.any()
        last = batch.attention_mask.sum(1)[:, None] - 1
        with torch.no_grad():
            full = model(**batch.kwargs()).logits[torch.arange(2), last[:, 0]]
        assert torch.allclose(suffix.logits(torch.tensor([0, 1]), last, last >= 0), full, atol=1e-4)


@pytest.mark.parametrize("model_type", DENSE)
def test_keys_at(model_type: str) -> None:
    """What is read at a token is k of that layer and that token: recorded from a forward of its row alone."""
    model = build(model_type)
    projections = resolve(model).projections
    rows, positions = [[1, 5, 9, 30, 44], [1, 7, 8]], [4, 1]
    found = keys_at(model, projections, Batch.of(rows, "cpu"), torch.tensor(positions))
    for r, (row, at) in enumerate(zip(rows, positions, strict=True)):
        for p, key in zip(projections, found, strict=True):
            inner: list[torch.Tensor] = []
            module = model.get_submodule(p.name)
            hook = module.register_forward_pre_hook(lambda _, args, inner=inner: inner.append(args[0]))
            with hooked([hook]), torch.no_grad():
                model(input_ids=torch.tensor([row]), use_cache=False)
            k = inner[0].view(len(row), p.p)[at]
            assert torch.allclose(key[r], k, atol=1e-4)


@pytest.mark.parametrize(("model_type", "square"), [("gpt2", {"n_inner": 32}), ("llama", {"intermediate_size": 32})])
def test_a_square_matrix_is_told_by_its_class(model_type: str, square: dict) -> None:
    model = pico(model_type, **square)
    p = resolve(model).projections[0]
    assert p.d == p.p == 32 and p.transposed == (model_type == "gpt2")
    W = torch.randn(32, 32)
    assert torch.equal(p.stored(p.oriented(W)), W) and p.stored(W).is_contiguous()
    turn_and_compare(model, p)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_seen_in_the_model(model_type: str, tied: bool) -> None:
    model = pico(model_type, tie_word_embeddings=tied)
    assert resolve(model).tied_embeddings is tied
    assert resolve(skeleton(model.config.to_dict())).tied_embeddings is tied


def test_unlisted_model_is_found_by_structure() -> None:
    model = pico("llama")
    model.config.model_type = "llama_of_tomorrow"
    arch = resolve(model)
    assert not arch.listed and arch.projections[2].name == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "longcat_flash", "jamba"])
def test_other_experts_are_refused(model_type: str) -> None:
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
    with pytest.raises(ModelError, match=r"mixture of experts of a kind not supported"):
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
    mlp = model.model.layers[1].mlp
    packed = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn"})(48, 32)
    for wrapped in (torch.nn.Sequential(mlp.down_proj), packed):
        mlp.down_proj = wrapped
        with pytest.raises(ModelError, match=rf"layers.1.mlp.down_proj is a .*{type(wrapped).__name__}"):
            resolve(model)


def test_adapters_are_to_be_merged_first() -> None:
    model = pico("llama")
    attention = model.model.layers[1].self_attn
    adapter = torch.nn.Module()
    adapter.base_layer, attention.q_proj = attention.q_proj, adapter  # what a LoRA on attention alone looks like
    with pytest.raises(ModelError, match=r"adapter is not merged.*layers.1.self_attn.q_proj(.|\n)*merge_and_unload"):
        resolve(model)


def test_layers_that_are_not_one_plain_stack_are_refused() -> None:
    model = pico("llama")
    model.model.more = torch.nn.ModuleList(model.model.layers[:1])
    with pytest.raises(ModelError, match=r"several stacks of layers \(model.layers, model.more\)"):
        resolve(model)
    model = pico("llama")
    model.model.layers[0].altup = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"several hidden states a token.*layers.0.altup"):
        resolve(model)


def test_a_large_skeleton_takes_no_memory() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    model = skeleton({"model_type": "llama", "vocab_size": 128256, **sizes, "quantization_config": None})
    assert all(p.is_meta for p in model.parameters())
    arch = resolve(model)
    assert len(arch.projections) == 80 and (arch.projections[79].d, arch.projections[79].p) == (8192, 28672)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "no_such_thing"}, "no_such_thing"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.y"}}, "remote code is never run"),
        ({"hidden_size": 3}, "not known"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "bart"}, "bart: an encoder-decoder model"),
        ({"model_type": "llama", "hidden_size": "many"}, "config.json"),
    ],
)
def test_bad_configs(config: dict, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        skeleton(config)


@pytest.mark.parametrize("model_type", DENSE)
def test_names_on_disk(model_type: str, tmp_path) -> None:
    build(model_type).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    arch = resolve(skeleton(checkpoint.config))
    names = disk_names(arch, checkpoint.tensors)
    assert len(set(names.values())) == len(arch.projections)
    for p in arch.projections:
        assert [checkpoint.entry(n).shape for n in names[p.name]] == [(p.p, p.d) if p.transposed else (p.d, p.p)]


def test_names_with_other_prefixes() -> None:
    arch = resolve(pico("gpt2"))
    plain = [f"h.{i}.mlp.c_proj.weight" for i in range(3)]
    assert disk_names(arch, plain)["transformer.h.2.mlp.c_proj"] == ("h.2.mlp.c_proj.weight",)
    with pytest.raises(ModelError, match=r"no tensor 'transformer.h.2.*\n.*nearest"):
        disk_names(arch, plain[:2])
    with pytest.raises(ModelError, match="may be any of"):
        disk_names(arch, [*plain, "other.h.0.mlp.c_proj.weight"])
    arch = resolve(skeleton(pico("gemma3").config))
    old = [f"language_model.model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    tower = ["vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight"]
    assert [n for (n,) in disk_names(arch, old + tower).values()] == old
    short = [name.removeprefix("language_model.model.") for name in old]
    assert [n for (n,) in disk_names(arch, short).values()] == short
    exact = [p.weight_name for p in arch.projections]
    assert [n for (n,) in disk_names(arch, exact + old).values()] == exact, "the exact name wins"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma4_text", "openai-gpt"])
def test_what_lies_below_is_run_once(model_type: str) -> None:
    """Keys and logits of rows taken out of a batch are the model's own, and the layers below do not run for them again."""
    model = build(model_type)
    arch = resolve(model)
    first = len(arch.projections) - 1
    batch = Batch.of([[1, 5, 9, 30, 44, 7, 3, 99], [1, 7, 8], [1, 9, 3, 44, 2]], "cpu")
    rows, at = torch.tensor([2, 0]), torch.tensor([4, 3])
    projections = arch.projections[first:]
    wanted = keys_at(model, projections, batch.rows(rows), at)
    one_more = Suffix(model, arch, first, batch)
    below = Below.of(model, arch, first, batch, Below.of(model, arch, first - 1, batch))
    runs: list[int] = []
    lower = layer_modules(model, arch)[first - 1]
    inner = next(m for m in lower.modules() if not list(m.children()))
    with hooked([inner.register_forward_hook(lambda *_: runs.append(1))]):
        with below.replayed(rows, torch.arange(5).expand(2, 5)):
            found = keys_at(model, projections, batch.rows(rows), at)
        suffix = Suffix(model, arch, first, batch, torch.tensor([3, 1, 0]), below)
        logits = suffix.logits(rows, at[:, None], at[:, None] >= 0)
    assert not runs
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(logits, one_more.logits(rows, at[:, None], at[:, None] >= 0), atol=1e-4)
