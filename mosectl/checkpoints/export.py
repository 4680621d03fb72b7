"""Patches for serving: as one LoRA (PEFT, vLLM, llama.cpp), or as a plain checkpoint without a trace of mosectl.

The change of a weight is ΔW = L W R − W, or B A. With compact rotations L = I + U X Uᵀ, R = I + V Y Vᵀ it has rank r + s
at most, so it *is* a LoRA: ΔW = [U X, L W V] [UᵀW; Y Vᵀ]. LoRAs add and rotations multiply: a stack becomes one LoRA.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosectl.checkpoints.apply import apply, check_stack
from mosectl.checkpoints.base import layout
from mosectl.checkpoints.modelfile import beside
from mosectl.errors import EditFailed, ModelError, UsageError
from mosectl.linalg.rotation import Compact, product_svd
from mosectl.model.architecture import Architecture
from mosectl.patch.change import Change, changed, combined
from mosectl.patch.file import Patch
from mosectl.patch.finite import check_changed, check_weight, is_finite
from mosectl.storage.atomic import output_errors, write_bytes, write_tensors
from mosectl.storage.checkpoint import JOURNAL, SIDECAR, Checkpoint, open_checkpoint
from mosectl.storage.folders import new_folder
from mosectl.storage.gguf import chosen
from mosectl.storage.places import Place, check_room, new_file
from mosectl.text.markdown import front_matter, inline, table
from mosectl.text.shown import answer_cell

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM takes (--max-lora-rank)
FORMS = ("lora", "gguf-lora", "merged")
# model_type → llama.cpp's name of the architecture, where it is another (convert_hf_to_gguf.py)
LLAMA_CPP = {
    **{"mistral": "llama", "mixtral": "llama", "ministral3": "mistral3", "cohere": "command-r", "glm": "chatglm"},
    **{"gemma3_text": "gemma3", "gemma4_text": "gemma4", "olmo3": "olmo2", "gpt_bigcode": "starcoder"},
    **{"gpt_neox": "gptneox", "phi": "phi2", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"},
    **{"glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2", "solar_open": "glm4moe", "exaone_moe": "exaone-moe"},
    **{"ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe", "minimax_m2": "minimax-m2"},
    **{"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"},
}
EXACT = 1e-6  # share of ΔW below which a direction is rounding
LITTLE = 0.1  # share of ΔW up to which a smaller rank is told of: docs/how-to/serve.md has what is lost by more
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    form: str
    rank: int  # of the adapter; 0 for a checkpoint
    left_out: float  # largest share ‖ΔW − B A‖ / ‖ΔW‖ of any layer, before rounding to ``dtype``
    modules: tuple[str, ...]
    dtype: str = "float32"  # of an adapter
    modelfile: Path | None = None  # for Ollama, beside the adapter
    # Smaller ranks, each with the largest share that it would leave out, where that is LITTLE at most.
    smaller: tuple[tuple[int, float], ...] = ()

    @property
    def exact(self) -> bool:
        """Nothing but rounding is left out."""
        return self.left_out < EXACT


def export(
    patches: Sequence[Patch],
    model: str | Path,
    out: str | Path,
    form: str = "lora",
    *,
    revision: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    ollama: str | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> Exported:
    """Write ``patches``, in their order on ``model``, as an adapter or as a checkpoint.

    Args:
        form: "lora" (a PEFT adapter folder), "gguf-lora" (one file for llama.cpp) or "merged" (a checkpoint folder).
        rank: cut the adapter down to it; default: the least legal rank that leaves nothing out.
        dtype: of the adapter's tensors.
        ollama: with "gguf-lora" a Modelfile is written beside the adapter, for this GGUF file or model of Ollama's; by
            default for ``model``, where that is a GGUF file.
        force: skip the check that the patches are for this model.
    Raises:
        UsageError: no such form, or a rank above 512 would be needed. BaseMismatch, ModelError, HubError, OutputError.
        EditFailed: the changed weights would not be finite.
    """
    if form not in FORMS:
        raise UsageError(f"--to {form}: no such form", fix=f"choose one of: {', '.join(FORMS)}")
    if form == "merged":
        return _merged(patches, open_checkpoint(model, revision), model, Path(out), revision, force, on_step)
    base = (ollama or _gguf_of(model)) if form == "gguf-lora" else None
    writing = new_file(Path(out)) if form == "gguf-lora" else new_folder(Path(out))
    with beside(Path(out), base) as modelfile, writing as place:
        checkpoint = open_checkpoint(model, revision)
        if not force:
            check_stack(checkpoint, patches)
        arch, names = layout(checkpoint)
        _reserve(place, patches, rank, dtype)
        factors, left_out, smaller = _adapter(patches, checkpoint, arch, names, rank, on_step)
        r = len(next(iter(factors.values()))[1])
        tensors = {m: (B.to(dtype), A.to(dtype)) for m, (B, A) in factors.items()}
        if wide := next((m for m, pair in tensors.items() if not all(map(is_finite, pair))), ""):
            raise EditFailed(f"the adapter's numbers are too large for {dtype}", where=wide, fix="--to merged")
        if isinstance(place, Place):
            _write_gguf(place, tensors, r, checkpoint, arch)
        else:
            _write_peft(place, tensors, r, patches, checkpoint, arch)
    kind = str(dtype).removeprefix("torch.")
    return Exported(Path(out), form, r, left_out, tuple(factors), kind, modelfile, smaller)


def _gguf_of(model: str | Path) -> str | None:
    file = chosen(model)
    return str(file) if file else None


def _reserve(place: Place | Path, patches: Sequence[Patch], rank: int | None, dtype: torch.dtype) -> None:
    """See that there is room for an adapter of the rank that these patches can have at most. Raises OutputError."""
    size = 0
    for module in {m for p in patches for m in p.changes}:
        d, p = next(p.base[module].shape for p in patches if module in p.changes)
        factors = [(kind, f) for q in patches if module in q.changes for kind, f in q.changes[module].factors.items()]
        most = sum(f.shape[0] if kind == "A" else f.shape[1] for kind, f in factors if kind not in ("B", "Q", "Q_in"))
        size += (d + p) * min(rank or most, RANKS[-1]) * dtype.itemsize
    if isinstance(place, Place):
        place.reserve(size)
    else:
        check_room(place, size, place)


def low_rank(change: Change, W: Tensor) -> tuple[Tensor, Tensor]:
    """B (d, r), A (r, p) float64 with B A = W' − W for W (d, p); of full rank where the change has a dense rotation."""
    W = W.double()
    if "A" in change.factors:
        return change.factors["B"].double(), change.factors["A"].double()
    L, R = change.rotation("R"), change.rotation("R_in")
    if isinstance(L, Tensor) or isinstance(R, Tensor):
        return change.apply(W) - W, torch.eye(W.shape[1]).to(W)
    B, A = [W[:, :0]], [W[:0]]
    if isinstance(L, Compact):
        B, A = [*B, L.U @ L.turn], [*A, L.U.T @ W]
        W = L.left(W)
    if isinstance(R, Compact):
        B, A = [*B, W @ R.U], [*A, R.turn @ R.U.T]
    return torch.cat(B, 1), torch.cat(A)


def _adapter(
    patches: Sequence[Patch],
    checkpoint: Checkpoint,
    arch: Architecture,
    names: Mapping[str, tuple[str, ...]],
    rank: int | None,
    on_step: OnStep | None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float, tuple[tuple[int, float], ...]]:
    """B (d, r) and A (r, p) of every changed module, float64, zero-padded to one rank; the largest share left out; and
    the smaller ranks that leave out little, with their shares.
    """
    projections = {p.name: p for p in arch.projections}
    modules = sorted({m for p in patches for m in p.changes}, key=lambda m: projections[m].layer)
    if mixed := next((m for m in modules if not projections[m].single_matrix), ""):
        what = "adapters for a mixture of experts are served by few engines and not written"
        raise UsageError(what, where=mixed, fix="--to merged writes a checkpoint")
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for i, module in enumerate(modules):
        name, own = names[module][0], [p for p in patches if module in p.changes]
        W, changes = projections[module].oriented(checkpoint.read(name)), [p.changes[module] for p in own]
        check_weight(name, W, str(checkpoint.folder))
        check_changed(name, W, changed(changes, W), changes, [p.id for p in own])
        found[module] = product_svd(*low_rank(combined(changes), W))
        if on_step:
            on_step(i + 1, len(modules))
    needed = max(int((EXACT * S.norm() < S).sum()) for _, S, _ in found.values())

    def left(k: int) -> float:
        return max(float(S[k:].norm() / S.norm().clamp_min(1e-300)) for _, S, _ in found.values())

    if rank is None and needed > RANKS[-1]:
        cut = f"--rank {RANKS[-1]} cuts it down ({left(RANKS[-1]):.1%} of the change are left out)"
        fix = f"{cut}, --to merged writes a checkpoint, edit --form compact"
        raise UsageError(f"exact only at rank {needed}, adapters are served up to rank {RANKS[-1]}", fix=fix)
    r = next((k for k in RANKS if k >= (rank or needed)), rank or needed)
    smaller = tuple((k, share) for k in reversed(RANKS) if k < r and (share := left(k)) <= LITTLE)
    return {m: _padded(U[:, :r], S[:r], Z[:r], r) for m, (U, S, Z) in found.items()}, left(r), smaller


def _padded(U: Tensor, S: Tensor, Zh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    B, A = U.new_zeros(len(U), r), U.new_zeros(r, Zh.shape[1])
    B[:, : len(S)], A[: len(S)] = U * root, root[:, None] * Zh
    return B, A


Factors = dict[str, tuple[Tensor, Tensor]]


def _write_peft(
    folder: Path, tensors: Factors, r: int, patches: Sequence[Patch], checkpoint: Checkpoint, arch: Architecture
) -> None:
    """An adapter folder as PEFT writes it: alpha = r, so that B A counts as it is."""
    used = [p for p in arch.projections if p.name in tensors]
    inside = {p.name.split(f"{arch.layers_path}.{p.layer}.", 1)[1] for p in used}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": _base_name(checkpoint),
        "revision": checkpoint.revision, "r": r, "lora_alpha": r, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(inside), "layers_to_transform": [p.layer for p in used],
        "layers_pattern": arch.layers_path.rsplit(".", 1)[-1], "fan_in_fan_out": used[0].transposed,
        "use_rslora": False, "use_dora": False, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip
    names: dict[str, Tensor] = {}
    for module, (B, A) in tensors.items():
        names[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        names[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    write_tensors(folder / "adapter_model.safetensors", names, {"format": "pt"})
    write_bytes(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    write_bytes(folder / "README.md", _card(patches, checkpoint, "A LoRA made of mosectl patches", r).encode())


def _write_gguf(place: Place, tensors: Factors, r: int, checkpoint: Checkpoint, arch: Architecture) -> None:
    """A LoRA file for llama.cpp, through the gguf package."""
    try:
        import gguf
    except ImportError as e:
        raise UsageError("--to gguf-lora needs the package gguf", fix='pip install "mosectl[gguf]"') from e
    name = checkpoint.gguf.architecture if checkpoint.gguf else LLAMA_CPP.get(arch.model_type, arch.model_type)
    if name not in gguf.MODEL_ARCH_NAMES.values():
        what = f"llama.cpp's name for '{arch.model_type}' is not known"
        raise ModelError(what, where=checkpoint.model, fix="export --to merged, and convert that with llama.cpp")
    layer_of = {p.name: p.layer for p in arch.projections}
    writer = gguf.GGUFWriter(place.ready(), name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(r))
    for module, (B, A) in tensors.items():
        tensor = f"blk.{layer_of[module]}.ffn_down.weight"  # an FFN's output projection, whatever it is called here
        writer.add_tensor(f"{tensor}.lora_a", A.float().contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", B.float().contiguous().numpy())
    with output_errors(place.final):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _merged(
    patches: Sequence[Patch],
    checkpoint: Checkpoint,
    model: str | Path,
    out: Path,
    revision: str | None,
    force: bool,
    on_step: OnStep | None,
) -> Exported:
    """A checkpoint like any other, with a card that says what was edited; nothing to revert it by."""
    with new_folder(out) as folder:
        inner = folder.with_name("applied")
        apply(patches, model, inner, revision=revision, keep_base=False, force=force, on_step=on_step)
        (inner / JOURNAL).unlink()
        shutil.rmtree(inner / SIDECAR)
        write_bytes(inner / "README.md", _card(patches, checkpoint, "An edited checkpoint").encode())
        inner.replace(folder)  # which is still empty
    modules = tuple(dict.fromkeys(m for p in patches for m in p.changes))
    return Exported(out, "merged", 0, 0.0, modules)


def _base_name(checkpoint: Checkpoint) -> str:
    return checkpoint.model if checkpoint.revision else str(checkpoint.folder.resolve())


_USE = """## Use

With PEFT: `PeftModel.from_pretrained(model, "FOLDER")`, FOLDER being this one.
With vLLM: `vllm serve MODEL --enable-lora --max-lora-rank {rank} --lora-modules edited=FOLDER`.
"""


def _card(patches: Sequence[Patch], checkpoint: Checkpoint, title: str, rank: int = 0) -> str:
    """README.md with what a user of the result has to know; ``rank``: of an adapter."""
    columns = ("prompt", "before", "asked for", "when the edit was made")
    about = ("adapter", "peft") if rank else ()
    body = [
        f"# {title}",
        "",
        f"Of {inline(checkpoint.model)}, by mosectl:",
        "",
        *(f"- `{p.id}`: {inline(p.method)}, {len(p.facts)} facts" for p in patches),
        "",
        *table(
            columns,
            [(f.prompt, answer_cell(f.before), f.target_new, answer_cell(f.after)) for p in patches for f in p.facts],
        ),
    ]
    body += ["", _USE.format(rank=rank)] if rank else []
    return front_matter(checkpoint.model if checkpoint.revision else "", *about) + "\n".join(body) + "\n"
