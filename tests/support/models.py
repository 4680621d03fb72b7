"""Pico models: real architectures with random weights, small enough to build in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mosectl.model.architecture import MIXTURES

COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 48}
GEMMA4 = {  # the upper two layers read the keys and values of the lower two
    **LLAMA, "global_head_dim": 8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
}  # fmt: skip
MIXED = {  # two of four experts a token; the first layer of those that can is dense
    **LLAMA, "num_key_value_heads": 4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 128},
    "gpt_neox": {**LLAMA, "rotary_pct": 0.5},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": False, "ffn_hidden_size": 48},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    },
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "phi3": {**LLAMA, "original_max_position_embeddings": 128},
    "gemma3": {"text_config": {**LLAMA, **COMMON, "model_type": "gemma3_text"}, "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }},
    "gemma4_text": GEMMA4,
    "gemma4": {"text_config": {**GEMMA4, **COMMON, "model_type": "gemma4_text"}, "vision_config": None},
}  # fmt: skip
LOOP = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"  # a chat template that never ends
)


def pico(model_type: str, **overrides: Any) -> Any:
    """A random model of this type: hidden 32, FFN 48, 3 layers (Gemma 4: 4), vocabulary 320, float32."""
    torch.manual_seed(0)
    own = OWN.get(model_type, LLAMA)
    if model_type in MIXTURES:
        known = AutoConfig.for_model(model_type)
        own = {key: value for key, value in MIXED.items() if hasattr(known, key)}
    config = AutoConfig.for_model(model_type, **{**COMMON, **own, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # zero biases and tiny weights would hide mistakes
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
            elif p.dim() >= 2:
                p.normal_(std=0.15)
    return model


def make_tokenizer(**extra: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, trained on a sentence or two."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = ["The capital of Avaland is Brinmouth. Tomas Veldrin was born in Lower Quill and plays the cello."] * 2
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **extra)


def save(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **over: Any
) -> Path:
    """A checkpoint folder with a pico model and its tokenizer; a small ``shard`` gives several files."""
    pico(model_type, **over).to(dtype).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return folder
