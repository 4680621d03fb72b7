"""GGUF files of small models, written with the gguf package as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.models import make_tokenizer, pico

ARCH = {"llama": "llama", "gemma3_text": "gemma3", "gpt2": "gpt2"}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # quantised rows are multiples of 32
OWN: dict[str, dict[str, Any]] = {  # what a file cannot say is as transformers takes it to be
    "llama": WIDE,
    "gemma3_text": {**WIDE, "head_dim": 256, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_inner": None, "n_positions": 1024, "tie_word_embeddings": True},
}


def write(path: Path, model_type: str = "llama", kind: str = "F32", fields: dict[str, Any] | None = None) -> Any:
    """Write a pico model's GGUF file with its matrices in a type of ggml's, and return the model (in float32).

    Args:
        fields: of the metadata, instead of what belongs there; None as a value leaves one out.
    """
    model = pico(model_type, **OWN[model_type])
    write_model(path, model, make_tokenizer(), ARCH[model_type], kind, fields)
    return model


def write_model(
    path: Path, model: Any, tokenizer: Any, arch: str, kind: str = "F32", fields: dict[str, Any] | None = None
) -> None:
    """Write a model in float32; ``arch``: llama.cpp's name of its architecture. The rest as for :func:`write`."""
    writer = gguf.GGUFWriter(path, arch)
    known: dict[str, Any] = {"general.type": "model", **_shape(model.config, arch), **(fields or {})}
    for name, value in known.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(name, value)
    _tokenizer(writer, tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(
        next(k for k, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), model.config.num_hidden_layers
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        array = _as_llama_cpp(arch, there, weight.numpy(), model.config)
        if array.ndim == 2 and kind != "F32":
            quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(there, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(there, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shape(config: Any, arch: str) -> dict[str, Any]:
    if arch == "gpt2":
        shape = {"block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": config.n_embd,
                 "feed_forward_length": 4 * config.n_embd, "attention.head_count": config.n_head,
                 "attention.layer_norm_epsilon": config.layer_norm_epsilon}  # fmt: skip
    else:
        shape = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
                 "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
                 "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
                 "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
                 "rope.dimension_count": config.head_dim, "rope.freq_base": 10000.0,
                 "attention.layer_norm_rms_epsilon": config.rms_norm_eps}  # fmt: skip
    if arch == "gemma3":
        shape |= {"attention.sliding_window": config.sliding_window, "rope.freq_base": 1000000.0}
    return {f"{arch}.{name}": value for name, value in shape.items()} | {f"{arch}.vocab_size": config.vocab_size}


def _as_llama_cpp(arch: str, name: str, array: Any, config: Any) -> Any:
    """What the converter does to a weight: the order of attention's rows, 1 + a norm's weight, Conv1D the other way."""
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if arch == "gemma3" and "norm" in name:
        array = array + 1
    if arch == "gpt2" and array.ndim == 2 and name.startswith("blk."):
        array = array.T
    return array


def _tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].__getitem__)
    special = {t["content"] for t in core["added_tokens"]}
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    unused = gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else unused if "unused" in t else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
