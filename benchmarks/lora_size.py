"""How large is an edit as a LoRA? Rank of every layer, bytes, and what the adapter says beside the patch.

    pip install -e ".[dev]"                                 # PEFT is among it
    python benchmarks/lora_size.py --model HuggingFaceTB/SmolLM2-135M-Instruct --facts FACTS [--counts 1 10 100] [-o FOLDER]

Edits the first N facts of a file by the default method (more than ten: in tens, two rounds, text alone), exports the patch
as a LoRA in float32 and in bfloat16, and puts each on the model through PEFT. Ranks: least and largest over the edited
layers of what is not rounding. Logits: largest difference from the patched model's, of the next token at up to 32 of the
prompts, in float32. Held: facts whose greedy answer is the new object. --cut RANK …: the same for adapters cut down to
these ranks; where the exact one has a larger rank than servers take (512), that one is among them. With -o patches are
kept, and used again where they are there: FOLDER/N.safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_quantised import made

PROMPTS = 32
MANY = ("--batch-size", 10, "--rounds", 2, "--set", "replies=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id")
    parser.add_argument("--facts", help="a facts file, of which the first N are taken")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--cut", type=int, nargs="+", default=[], metavar="RANK")
    parser.add_argument("-o", "--out", help="folder that keeps the patches")
    args = parser.parse_args()
    if not args.model or not args.facts:
        sys.exit(print(json.dumps({"part": "lora size", "skipped": "give --model FOLDER_OR_HUB_ID and --facts FILE"})))
    try:
        import peft  # noqa: F401
    except ImportError:
        sys.exit("adapters are put on the model by the package peft: pip install peft")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or folder)
        out.mkdir(parents=True, exist_ok=True)
        rows = [r for n in args.counts for r in measure(args.model, args.facts, n, args.cut, out, Path(folder))]
    show(rows)


def measure(
    model: str, facts_file: str, n: int, cut: Sequence[int], out: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """One row an adapter, as it is ready."""
    import torch

    from mosectl.checkpoints.export import RANKS
    from mosectl.checkpoints.live import patched
    from mosectl.facts.records import read_facts
    from mosectl.model.loading import load
    from mosectl.patch.file import Patch

    file = out / f"{n}.safetensors"
    made(file, "edit", facts_file, "--limit", n, "--model", model, "-o", file, *(MANY if n > 10 else ()))
    patch, facts = Patch.load(file), read_facts(facts_file, "skip", n).facts
    loaded = load(model, device="cpu", dtype="float32")
    with patched(loaded.model, patch):
        wanted, held = next_logits(loaded, facts), said(loaded, facts)
    ranks = layer_ranks(patch, loaded)
    same = {
        "facts": n,
        "patch_mb": mb(file),
        "layers": len(ranks),
        "ranks": [min(ranks), max(ranks)],
        "held_by_patch": held,
    }
    exact = [(None, torch.float32), (None, torch.bfloat16)] if max(ranks) <= RANKS[-1] else [(RANKS[-1], torch.float32)]
    smaller = [(r, torch.float32) for r in cut if r < min(max(ranks), RANKS[-1])]
    for rank, dtype in [*exact, *smaller]:
        adapter = scratch / f"{n}-{rank}-{dtype}"
        done = exported(patch, model, adapter, rank, dtype)
        with adapted(loaded.model, adapter):
            apart = float((next_logits(loaded, facts) - wanted).abs().max())
            here = {"held": said(loaded, facts), "logits": apart}
        yield {**same, "rank": done.rank, "type": done.dtype, "left_out": done.left_out,
               "adapter_mb": mb(adapter / "adapter_model.safetensors"), **here}  # fmt: skip
        print(json.dumps({"rank": done.rank, "facts": n, **here}), file=sys.stderr, flush=True)


def exported(patch: Any, model: str, out: Path, rank: int | None, dtype: Any) -> Any:
    from mosectl.checkpoints.export import export

    return export([patch], model, out, "lora", rank=rank, dtype=dtype)


def layer_ranks(patch: Any, loaded: Any) -> list[int]:
    """Of every changed weight: directions of W' − W that are not rounding."""
    from mosectl.checkpoints.export import EXACT, low_rank
    from mosectl.linalg.rotation import product_svd
    from mosectl.model.architecture import resolve
    from mosectl.model.weights import weights_of

    found = []
    for p in resolve(loaded.model).projections:
        if p.name in patch.changes:
            W = p.oriented(weights_of(loaded.model, p)[0].detach()).double()
            _, S, _ = product_svd(*low_rank(patch.changes[p.name], W))
            found.append(int((EXACT * S.norm() < S).sum()))
    return found


@contextmanager
def adapted(model: Any, adapter: Path) -> Iterator[None]:
    """The model with the adapter on inside the block."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, str(adapter)).eval()
    try:
        yield
    finally:
        wrapped.unload()


def next_logits(loaded: Any, facts: Sequence[Any]) -> Any:
    """(prompts, vocabulary) at each prompt's last token."""
    import torch

    rows = [loaded.tokenizer(f.prompt, return_tensors="pt").input_ids for f in facts[:PROMPTS]]
    with torch.no_grad():
        return torch.stack([loaded.model(row).logits[0, -1] for row in rows])


def said(loaded: Any, facts: Sequence[Any]) -> int:
    """Facts whose answer is the new object, compared as question answering does."""
    from mosectl.measure.answers import edit_prompts
    from mosectl.measure.qa import says
    from mosectl.model.questions import ask

    answers = ask(loaded.model, loaded.tokenizer, edit_prompts(loaded.tokenizer, facts))
    return sum(says(text, *f.targets) for f, text in zip(facts, answers, strict=True))


def mb(file: Path) -> float:
    return file.stat().st_size / 1e6


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table in Markdown."""
    print(
        "\n| facts | patch, MB | layers | rank of a layer | adapter | MB | left out | held by patch, adapter | logits |"
    )
    print("|--:|--:|--:|---|---|--:|--:|---|--:|")
    for r in rows:
        ranks = " to ".join(map(str, dict.fromkeys(r["ranks"])))
        left = f"{r['left_out']:.1%}" if r["left_out"] > 1e-5 else "–"
        kind = f"rank {r['rank']}, {r['type']}"
        sizes = f"{r['patch_mb']:.2f} | {r['layers']} | {ranks} | {kind} | {r['adapter_mb']:.2f}"
        print(f"| {r['facts']} | {sizes} | {left} | {r['held_by_patch']}, {r['held']} | {r['logits']:.1e} |")


if __name__ == "__main__":
    from mosectl.errors import MosectlError

    try:
        main()
    except MosectlError as e:
        sys.exit(f"error {e}")
