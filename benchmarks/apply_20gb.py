"""Apply a patch to a 20 GB checkpoint of Llama-3-8B's shapes: seconds and peak memory, beside a copy of the changed shards.

    python benchmarks/apply_20gb.py WORK_FOLDER [--layers 19,20,21] [--rank 64] [--shards 4]

40 layers instead of 32 make 20 GB. The shards that the patch touches hold random bf16 numbers, all others are sparse files
of zeros that take no room. Needs about three times the size of the touched shards. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import fingerprint

D, P, LAYERS, VOCABULARY = 4096, 14336, 40, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": P,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def shapes() -> dict[str, list[int]]:
    """Every tensor of the model by name."""
    out = {"model.embed_tokens.weight": [VOCABULARY, D]}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        out |= {f"{at}.self_attn.{n}_proj.weight": [1024 if n in "kv" else D, D] for n in "qkvo"}
        out |= {f"{at}.mlp.{n}_proj.weight": [P, D] for n in ("gate", "up")} | {f"{at}.mlp.down_proj.weight": [D, P]}
        out |= {f"{at}.{n}_layernorm.weight": [D] for n in ("input", "post_attention")}
    return out | {"model.norm.weight": [D], "lm_head.weight": [VOCABULARY, D]}


def make(folder: Path, touched: set[str], shards: int) -> None:
    """A checkpoint folder; only shards with a ``touched`` tensor take room on the disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = {n: 2 * torch.Size(s).numel() for n, s in shapes().items()}
    limit, parts, used = sum(sizes.values()) / shards, [[]], 0
    for name, size in sizes.items():
        if used + size > limit and len(parts) < shards:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    index = {}
    for i, names in enumerate(parts, 1):
        file = folder / f"model-{i:05}-of-{len(parts):05}.safetensors"
        header, at = {}, 0
        for n in names:
            header[n] = {"dtype": "BF16", "shape": shapes()[n], "data_offsets": [at, at + sizes[n]]}
            index[n], at = file.name, at + sizes[n]
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with file.open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            if touched & set(names):
                g = torch.Generator().manual_seed(i)
                for n in names:
                    for _ in range(0, sizes[n], 2**26):
                        rest = min(2**26, 8 + len(raw) + header[n]["data_offsets"][1] - f.tell())
                        block = torch.randn(rest // 2, generator=g).bfloat16() / 64
                        f.write(block.view(torch.uint8).numpy().tobytes())
            f.truncate(8 + len(raw) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def patch_for(folder: Path, layers: list[int], rank: int) -> Patch:
    """Compact rotations on both sides of some layers' output projections."""
    from mosectl.storage.checkpoint import open_checkpoint

    checkpoint, g = open_checkpoint(folder), torch.Generator().manual_seed(0)
    changes, base = {}, {}
    for i in layers:
        module = f"model.layers.{i}.mlp.down_proj"
        factors = {}
        for n, (u, q) in ((D, ("U", "Q")), (P, ("U_in", "Q_in"))):
            factors[u] = torch.linalg.qr(torch.randn(n, rank, generator=g))[0].contiguous()
            X = 0.05 * torch.randn(rank, rank, generator=g)
            factors[q] = torch.matrix_exp(X - X.T)
        changes[module] = Change(factors)
        base[module] = fingerprint(f"{module}.weight", checkpoint.read(f"{module}.weight"))
    return Patch(changes, "isospectral", "both", {}, "llama-3-8b-shape", None, "llama", base, (), {}, 0, {})


def measured(*command: str) -> dict[str, float]:
    """Seconds, and peak resident memory in GB (not less than this process' own when it starts the other), of one process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - start, "peak_gb": used.ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", default="19,20,21")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()
    layers = [int(x) for x in args.layers.split(",")]
    base, patch, out = args.work / "base", args.work / "patch.safetensors", args.work / "edited"
    touched = {f"model.layers.{i}.mlp.down_proj.weight" for i in layers}
    if not base.exists():
        make(base, touched, args.shards)
    patch_for(base, layers, args.rank).save(patch)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted({index[n] for n in touched})
    copies = [str(base / s) for s in shards]
    (args.work / "copy").mkdir()
    os.sync()
    copied = measured("cp", "--reflink=never", *copies, str(args.work / "copy"))
    start = time.perf_counter()
    os.sync()
    copied["seconds"] += time.perf_counter() - start  # apply makes its files last, a fair copy does too
    command = [sys.executable, "-m", "mosectl", "apply", str(patch), "--model", str(base), "-o", str(out)]
    applied = measured(*command)
    reverted = measured(sys.executable, "-m", "mosectl", "revert", str(patch), "--model", str(out))
    same = subprocess.run(["cmp", *(str(f / shards[0]) for f in (base, out))]).returncode == 0
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "checkpoint_gb": size / 1e9, "changed_shards_gb": sum((base / s).stat().st_size for s in shards) / 1e9,
                "patch_mb": patch.stat().st_size / 1e6, "copy": copied, "apply": applied, "revert": reverted,
                "apply_to_copy": applied["seconds"] / copied["seconds"], "reverted_same": same,
                "self_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
