"""Where a model keeps its FFN output projections: one table, every entry checked against the model's structure.

Orientation comes from the module's class, never from a shape: a square matrix looks the same both ways.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mosectl.errors import ModelError, UsageError
from mosectl.model.claims import at_most, check_counts
from mosectl.model.edit_site import Dense, DiskNames, Projection
from mosectl.model.moe import SHARED, Mixture
from mosectl.model.quantised import refuse_quantised

# model_type -> (path of the projection inside a layer, path of a norm after the FFN)
_DOWN = ("mlp.down_proj", None)
TABLE: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "phi3", "granite"), _DOWN
    ),
    **dict.fromkeys(("smollm3", "cohere", "cohere2", "stablelm", "olmo", "nemotron", "glm", "seed_oss"), _DOWN),
    **dict.fromkeys(("apertus", "arcee"), _DOWN),
    **dict.fromkeys(
        ["gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "olmo2", "olmo3", "exaone4"],
        ("mlp.down_proj", "post_feedforward_layernorm"),
    ),
    "glm4": ("mlp.down_proj", "post_mlp_layernorm"),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "starcoder2"], ("mlp.c_proj", None)),
    **dict.fromkeys(["gptj", "codegen"], ("mlp.fc_out", None)),
    **dict.fromkeys(["gpt_neox", "bloom", "falcon"], ("mlp.dense_4h_to_h", None)),
    "opt": ("fc2", None),
    "phi": ("mlp.fc2", None),
    "mpt": ("ffn.down_proj", None),
}
# Types whose layers may be mixtures of experts: each is tested to be turned by turning all experts alike.
MIXTURES = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "flex_olmo", "minimax_m2", "ernie4_5_moe", "exaone_moe"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "hunyuan_v1_moe", "solar_open"),
}
_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
_TOWERS = {"vision_tower", "vision_model", "visual", "audio_tower", "encoder"}
_NOT_FFN = ("attn", "attention", "mixer", "mamba", "temporal")  # in the path of a matrix that is no FFN's
_PLAIN = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.pytorch_utils",
)  # where an unwrapped matrix is from
_SUPPORTED = (
    "supported are models such as Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, Falcon, BLOOM, Mixtral"
)


@dataclass(frozen=True)
class Architecture:
    """What mosectl needs to know of a model."""

    model_type: str
    listed: bool  # in the table; otherwise found by structure
    layers_path: str
    projections: tuple[Projection, ...]
    post_norm: str | None  # norm behind the FFN, inside a layer
    tied_embeddings: bool


def resolve(model: nn.Module, name: str = "") -> Architecture:
    """Find the FFN output projection of every layer.

    Args:
        name: what errors call the model, beside its type.
    Raises:
        ModelError: an unknown mixture of experts, a quantised or adapter-wrapped model, or no such projection; says what
            was found.
    """
    try:
        return _resolved(model)
    except ModelError as e:
        if not name:
            raise
        raise ModelError(e.what, where=f"{name} ({e.where})", fix=e.fix) from e


def _resolved(model: nn.Module) -> Architecture:
    config = model.config
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[operator]
    except ValueError as e:  # several language models in one, as in musicgen
        raise ModelError("several text models in one", where=str(config.model_type), fix=_SUPPORTED) from e  # type: ignore[union-attr]
    model_type = str(text.model_type)  # type: ignore[union-attr]
    refuse_quantised(config, model_type)
    path, layers = _decoder_layers(model, model_type)
    # Every layer first: a model whose lower layers are dense is refused for its experts, not for their shape.
    for i, layer in enumerate(layers):
        _refuse_parts(layer, f"{path}.{i}", model_type)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    hidden = getattr(text, "hidden_size", embedding.shape[1])
    entry = ("mlp.down_proj", None) if model_type in MIXTURES else TABLE.get(model_type)
    found = []
    for i, layer in enumerate(layers):
        if block := _block(layer, model_type):
            found.append(_mixture(i, f"{path}.{i}", block, layer, model_type))
            continue
        inside = entry[0] if entry else _by_structure(layer, hidden, f"{path}.{i}", model_type)
        found.append(_projection(i, f"{path}.{i}", inside, layer, hidden, model_type))
    if len({p.transposed for p in found}) > 1:
        raise ModelError("its layers keep their FFN output in matrices of two kinds", where=model_type, fix=_SUPPORTED)
    norms = [n for n in _POST_NORMS if hasattr(layers[0], n)]
    return Architecture(
        model_type=model_type,
        listed=entry is not None,
        layers_path=path,
        projections=tuple(found),
        post_norm=entry[1] if entry else (norms[0] if norms else None),
        tied_embeddings=model.get_output_embeddings().weight is embedding,  # type: ignore[operator]
    )


def _decoder_layers(model: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """The longest list of modules that are all of one kind, outside vision towers and encoders."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("an encoder-decoder model", where=model_type, fix=_SUPPORTED)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ModelError("has no language model head", where=model_type, fix="give a causal language model")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _TOWERS.intersection(name.split("."))
    ]
    if not lists:
        raise ModelError("no list of decoder layers found", where=model_type, fix=_SUPPORTED)
    # Nested lists (heads, experts) lie below the layers: the shallowest path is the decoder's.
    depth = min(name.count(".") for name, _ in lists)
    shallow = [item for item in lists if item[0].count(".") == depth]
    path, layers = max(shallow, key=lambda item: len(item[1]))
    if rivals := [name for name, module in shallow if module is not layers and type(module[0]) is type(layers[0])]:
        raise ModelError(f"several stacks of layers ({path}, {', '.join(rivals)})", where=model_type, fix=_SUPPORTED)
    return path, layers


def _refuse_parts(layer: nn.Module, path: str, model_type: str) -> None:
    """What makes a layer's FFN something else than matrices that can be turned: unknown experts, adapters, AltUp."""
    block = _block(layer, model_type)
    for name, module in layer.named_modules():
        last, kind = name.rsplit(".", 1)[-1], type(module).__name__
        if (last in ("experts", "block_sparse_moe", *SHARED) or "Experts" in kind) and not (
            block and name.startswith(f"{block}.")
        ):
            raise ModelError(
                f"a mixture of experts of a kind not supported yet (found {path}.{name}, {kind})",
                where=model_type,
                fix=f"{_SUPPORTED}; mixtures of experts: {', '.join(sorted(MIXTURES))}",
            )
        if hasattr(module, "base_layer"):
            raise ModelError(
                f"an adapter is not merged (found {path}.{name}, {kind})",
                where=model_type,
                fix="merge it first: model = model.merge_and_unload()",
            )
        if last == "altup":  # the layer hands on a stack of hidden states, and all that runs parts of a model wants one
            raise ModelError(
                f"several hidden states a token (found {path}.{name}): not supported yet",
                where=model_type,
                fix=_SUPPORTED,
            )


def _block(layer: nn.Module, model_type: str) -> str:
    """The path of a layer's mixture of experts, if it is one that can be turned as a whole; else ""."""
    if model_type not in MIXTURES:
        return ""
    for name, module in layer.named_modules():
        experts = getattr(module, "experts", None)
        weight = getattr(experts, "down_proj", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 3 and not hasattr(experts, "down_proj_bias"):
            return name
    return ""


def _mixture(i: int, path: str, inside: str, layer: nn.Module, model_type: str) -> Projection:
    block = layer.get_submodule(inside)
    experts, d, _ = block.experts.down_proj.shape  # type: ignore[union-attr, misc]
    shared = next((f"{name}.down_proj" for name in SHARED if getattr(block, name, None) is not None), "")
    if shared and not (_is_linear(own := block.get_submodule(shared)) and own.bias is None):
        raise ModelError(f"{path}.{inside}.{shared} is no plain matrix", where=model_type, fix=_SUPPORTED)
    return Mixture(i, f"{path}.{inside}", d, d, False, False, experts, shared)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d, p) of a Linear or Conv1D."""
    rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _by_structure(layer: nn.Module, hidden: int, path: str, model_type: str) -> str:
    """In an unlisted model: the one matrix outside attention that maps a wider space to the hidden one."""
    found = [
        name
        for name, module in layer.named_modules()
        if _is_linear(module)
        and not any(part in name.lower() for part in _NOT_FFN)
        and _shape(module)[0] == hidden
        and _shape(module)[1] > hidden
    ]
    if len(found) != 1:
        seen = (
            ", ".join(f"{n} {type(m).__name__}" for n, m in layer.named_modules() if hasattr(m, "weight")) or "nothing"
        )
        raise ModelError(
            f"no single FFN output projection in {path}: {len(found)} candidates among {seen}",
            where=model_type,
            fix=_SUPPORTED,
        )
    return found[0]


def _projection(i: int, path: str, inside: str, layer: nn.Module, hidden: int, model_type: str) -> Projection:
    try:
        module = layer.get_submodule(inside)
    except AttributeError as e:
        names = ", ".join(n for n, m in layer.named_modules() if _is_linear(m))
        raise ModelError(f"no {path}.{inside}; its matrices are {names}", where=model_type, fix=_SUPPORTED) from e
    if not _is_linear(module) or not type(module).__module__.startswith(_PLAIN):
        raise ModelError(
            f"{path}.{inside} is a {type(module).__module__}.{type(module).__name__}, not a plain matrix",
            where=model_type,
            fix="give the unquantised model, with adapters merged",
        )
    d, p = _shape(module)
    if d != hidden:
        raise ModelError(
            f"{path}.{inside} writes {d} numbers, the hidden size is {hidden}", where=model_type, fix=_SUPPORTED
        )
    return Dense(i, f"{path}.{inside}", d, p, type(module).__name__ == "Conv1D", module.bias is not None)


def skeleton(config: Any, tensors: int | None = None) -> nn.Module:
    """The model of a config.json (dict or PretrainedConfig) without any weight, on the meta device.

    Args:
        tensors: how many the weight files hold: a config that claims many more is refused before all of them are built.
    Raises:
        ModelError: transformers does not know the model type; remote code is never run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, Mapping):
        content = dict(config)
        check_counts(content)
        model_type = str(content.pop("model_type", None))
        try:
            config = AutoConfig.for_model(model_type, **content)
        except (ValueError, KeyError, TypeError) as e:
            own = " (its own remote code is never run)" if "auto_map" in content else ""
            raise ModelError(
                f"model type '{model_type}' is not known to transformers{own}",
                where="config.json",
                fix=f"update transformers; {_SUPPORTED}",
            ) from e
        except Exception as e:  # config classes check their fields in many ways
            raise ModelError(f"damaged: {_first_line(e)}", where="config.json", fix="fetch the model again") from e
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("an encoder-decoder model", where=str(config.model_type), fix=_SUPPORTED)
    try:
        with torch.device("meta"), at_most(tensors):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except ValueError as e:
        raise ModelError(
            f"'{config.model_type}' is not a causal language model", where="config.json", fix=_SUPPORTED
        ) from e
    except ImportError as e:
        raise ModelError(f"cannot be built: {_first_line(e)}", where="config.json", fix="install that package") from e
    except Exception as e:  # building from a nonsensical config can fail anywhere
        raise ModelError(f"cannot be built: {_first_line(e)}", where="config.json", fix="fetch the model again") from e


def _first_line(e: Exception) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def disk_names(arch: Architecture, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Module path → tensor names on disk, for every edit site.

    Raises:
        ModelError: a tensor is missing, or several fit.
    """
    disk = DiskNames.of(arch.layers_path, names)
    return {p.name: p.tensor_names(disk) for p in arch.projections}


def parse_layers(text: str, n: int, every: str = "auto") -> tuple[int, ...] | None:
    """``every`` → None; "19,20,21" or "19-21" → layer indices, sorted.

    Raises:
        UsageError: not a list of layers, or a layer the model does not have.
    """
    if text == every:
        return None
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            chosen |= set(range(int(low), int(high or low) + 1))
    except ValueError:
        chosen = set()
    if not chosen or min(chosen) < 0 or max(chosen) >= n:
        raise UsageError(
            f"--layers {text}: not layers of this model",
            fix=f"give {every}, or numbers from 0 to {n - 1} such as 3,4,5 or 3-5",
        )
    return tuple(sorted(chosen))
