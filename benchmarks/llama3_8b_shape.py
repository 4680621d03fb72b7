"""A whole edit on a model of Llama-3-8B's exact shapes with random weights: memory, seconds a phase, and the plan's word.

    python benchmarks/llama3_8b_shape.py                        # 100 facts in bf16 on a GPU, no more than 24 GB of it
    python benchmarks/llama3_8b_shape.py --depth 4 --facts 10   # four of its layers, where there is less of a machine
    python benchmarks/llama3_8b_shape.py --plan                 # nothing is run: what `edit --dry-run` would say

Random weights reach nothing, so every fact takes every step: the slow case. Memory is what counts here, and is compared
with `mosectl edit --dry-run`'s estimate. On a CPU the peak is that of the process, read anew in each phase.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peak import peak_bytes, reset_peak, resident_bytes
from speed import DEMO, SHAPES, llama_config, random_llama
from transformers import AutoTokenizer

from mosectl.editing.edit import edit
from mosectl.editing.options import default_options
from mosectl.editing.plan import estimate
from mosectl.errors import MosectlError
from mosectl.facts.records import Fact
from mosectl.model.loading import pick_device

NEW = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Lisbon")


def main() -> None:
    args = _arguments()
    device = pick_device(args.device)
    config = llama_config(args.shape, args.depth)
    config.dtype = dtype = getattr(torch, args.dtype)
    layers = args.layers or ",".join(str(i) for i in range(4, 7) if i < config.num_hidden_layers - 1) or "1"
    options = replace(default_options(args.method), layers=layers, guard=0.0)
    options = replace(options, rounds=args.rounds or options.rounds)
    facts = [Fact(f"The town of Number {i} lies near", f"Number {i}", NEW[i % len(NEW)]) for i in range(args.facts)]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = estimate(folder, facts, options, device=device, dtype=args.dtype, host=False if args.gpu else None)
    said = {"peak_gb": plan.peak_bytes / 1e9, "seconds": plan.seconds, "patch_mb": plan.patch_bytes / 1e6}
    print(json.dumps({"plan": _rounded(said), "device": device, "parameters": plan.parameters, "layers": layers}))
    if args.plan:
        return
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 1e9 / total))
    before = resident_bytes()
    loaded = random_llama(config, device, dtype, AutoTokenizer.from_pretrained(DEMO / "demo-model"))
    peaks: dict[str, float] = {}
    start = time.perf_counter()
    result = edit(facts, loaded, options=options, refuse=False, on_step=_watch(peaks, device, before))
    took = time.perf_counter() - start
    peak = max(peaks.values())
    size = sum(c.nbytes for c in result.patch.changes.values())
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name()
                if device == "cuda"
                else f"CPU, {torch.get_num_threads()} threads",
                "facts": args.facts,
                "facts_a_second": round(args.facts / took, 3),
                "seconds": _rounded(result.seconds),
                "peak_gb": _rounded(peaks),
                "plan_against_measured": {
                    "peak": round(plan.peak_bytes / 1e9 / peak, 2),
                    "seconds": round(sum(v for k, v in plan.seconds.items() if k != "load") / took, 2),
                },
                "patch_mb": round(size / 1e6, 2),
            },
            indent=1,
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", choices=SHAPES)
    parser.add_argument("--depth", type=int, help="layers, fewer than the shape's own")
    parser.add_argument("--layers", help="edited layers (default 4-6)")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="of targets and solve (default: the method's)")
    parser.add_argument("--method", default="isospectral")
    parser.add_argument("--memory", type=float, default=24.0, help="GB of the GPU that may be used")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--plan", action="store_true", help="only the estimate")
    parser.add_argument("--gpu", action="store_true", help="estimate a GPU's memory, also where there is none")
    return parser.parse_args()


def _watch(peaks: dict[str, float], device: str, before: int) -> Callable[[str, int, int], None]:
    """Notes the peak of memory of each phase, in GB, on the GPU or, on a CPU, of the process beyond ``before``."""
    phase = ""

    def on_step(name: str, done: int, total: int) -> None:
        nonlocal phase
        if phase:
            peaks[phase] = max(peaks.get(phase, 0.0), peak_bytes(device, before) / 1e9)
        if name != phase:
            phase = name
            reset_peak(device)

    return on_step


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _rounded(v) if isinstance(v, dict) else round(v, 2) for k, v in values.items()}


if __name__ == "__main__":
    try:
        main()
    except MosectlError as e:
        raise SystemExit(f"error {e}") from None
