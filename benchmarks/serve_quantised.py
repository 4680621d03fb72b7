"""Does an edit of the full checkpoint hold on a quantised one? Made on the full model, served as a LoRA on its rounded copy.

    pip install -e ".[dev]" bitsandbytes                  # or hqq, optimum-quanto, torchao: what --quantise asks for
    python benchmarks/serve_quantised.py --model HuggingFaceTB/SmolLM2-135M-Instruct --quantise nf4 int8 [-o FOLDER]

For one fact (--fact) and for a file of them (--facts) it runs `mosectl edit` and `mosectl export` and asks five models: the
full one without and with the patch; the quantised one without and with the adapter (through PEFT); and the quantised copy
of the edited checkpoint. Said: facts and rephrasings whose greedy answer is the new object, compared as question
answering does. Kept: neighbours, and other prompts about the subject, whose answer is that of the same model without the
edit. Text: mean loss of the embedded corpus, nats a token. With -o patches and adapters are kept, and used again.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACT = ("The capital of France is", "France", "Rome")
FACTS = Path(__file__).with_name("real-facts.jsonl")


def _bits(**how: Any) -> Callable[[Any], Any]:
    def config(dtype: Any) -> Any:
        from transformers import BitsAndBytesConfig

        compute = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in how else {}
        return BitsAndBytesConfig(**how, **compute)

    return config


def _hqq(_: Any) -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64)


def _quanto(weights: str) -> Callable[[Any], Any]:
    def config(_: Any) -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return config


def _torchao(_: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# name → package to install, what transformers is given to load with
KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "nf4": ("bitsandbytes", _bits(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "fp4": ("bitsandbytes", _bits(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "int8": ("bitsandbytes", _bits(load_in_8bit=True)),
    "hqq": ("hqq", _hqq),
    "quanto-int4": ("optimum-quanto", _quanto("int4")),
    "quanto-int8": ("optimum-quanto", _quanto("int8")),
    "torchao-int8": ("torchao", _torchao),
}


@dataclass(frozen=True)
class Found:
    """What one model said."""

    interview: Any
    text: Any  # TextLoss

    @property
    def loss(self) -> float:
        return sum(t.total for t in self.text.texts) / sum(t.weight for t in self.text.texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the full checkpoint: a folder or hub id")
    parser.add_argument("--fact", nargs=3, default=FACT, metavar=("PROMPT", "SUBJECT", "TARGET"))
    parser.add_argument("--facts", default=str(FACTS), help="a facts file; default: benchmarks/real-facts.jsonl")
    parser.add_argument("--quantise", nargs="+", default=["nf4"], choices=KINDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the full model, and of what is computed on the quantised"
    )
    parser.add_argument("-o", "--out", help="folder that keeps patches and adapters; what is there is not made again")
    parser.add_argument("--json", action="store_true", help="one line a row instead of tables")
    args = parser.parse_args()
    if not args.model:
        sys.exit(print(json.dumps({"part": "quantised", "skipped": "no model: give --model FOLDER_OR_HUB_ID"})))
    for kind in args.quantise:
        usable(kind)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or folder)
        out.mkdir(parents=True, exist_ok=True)
        one = out / "one.jsonl"
        one.write_text(json.dumps(dict(zip(("prompt", "subject", "target_new"), args.fact, strict=True))), "utf-8")
        for facts, name in ((one, "one"), (Path(args.facts), "many")):
            rows = measure(args.model, facts, out / name, args.quantise, args.device, args.dtype)
            show(rows) if not args.json else [print(json.dumps(row), flush=True) for row in rows]


def usable(kind: str) -> None:
    """Ends with one line where what ``kind`` needs is not installed."""
    import torch

    package, config = KINDS[kind]
    try:
        import peft  # noqa: F401

        config(torch.bfloat16)
        __import__({"optimum-quanto": "optimum.quanto"}.get(package, package))
    except ImportError as e:
        sys.exit(f"--quantise {kind} needs the packages peft and {package} ({e}): pip install peft {package}")


def measure(
    model: str, facts_file: Path, out: Path, kinds: Sequence[str], device: str, dtype: str
) -> list[dict[str, Any]]:
    """Edit, export, ask all of them; ``out`` begins the names of the files."""
    from mosectl.checkpoints.live import patched
    from mosectl.facts.records import as_facts
    from mosectl.model.loading import DTYPES, load
    from mosectl.patch.file import Patch

    facts = as_facts(facts_file, "ask about")
    patch, adapter, merged = (out.with_name(f"{out.name}{end}") for end in (".safetensors", "-lora", "-merged"))
    where = ("--device", device, "--dtype", dtype)
    made(patch, "edit", facts_file, "--model", model, "-o", patch, *where)
    made(adapter, "export", patch, "--model", model, "--to", "lora", "-o", adapter)
    made(merged, "export", patch, "--model", model, "--to", "merged", "-o", merged)
    loaded = load(model, device=device, dtype=dtype)
    tokenizer, folder = loaded.tokenizer, loaded.checkpoint.folder  # type: ignore[union-attr]
    full = asked(loaded.model, tokenizer, facts)
    with patched(loaded.model, Patch.load(patch)):
        edited = asked(loaded.model, tokenizer, facts, full)
    del loaded
    rows = [row("full", "no edit", facts, full, full), row("full", "with the patch", facts, edited, full)]
    for kind in kinds:
        config = KINDS[kind][1]

        def quantised(at: Path, config: Callable[[Any], Any] = config) -> Any:
            return load_quantised(at, config(DTYPES[dtype]), device, DTYPES[dtype])

        if (rounded := quantised(folder)) is None:
            continue
        plain = asked(rounded, tokenizer, facts, full)
        served = asked(with_adapter(rounded, adapter), tokenizer, facts, full)
        del rounded
        gc.collect()
        later = asked(quantised(merged), tokenizer, facts, full)
        rows += [
            row(kind, "no edit", facts, plain, plain),
            row(kind, "with the adapter", facts, served, plain),
            row(kind, "edited, then quantised", facts, later, plain),
        ]
    return rows


def made(path: Path, *words: object) -> None:
    """``path``, by a command of mosectl's, unless it is there."""
    if path.exists():
        return
    command = [sys.executable, "-m", "mosectl", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip()[-2000:])


def load_quantised(folder: Path, config: Any, device: str, dtype: Any) -> Any:
    """The checkpoint, rounded while it is loaded; None, and a line about it, where that does not work here."""
    from transformers import AutoModelForCausalLM

    from mosectl.storage.quiet import quiet

    how: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": False}
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **how).eval()
    except (ImportError, OSError, ValueError, RuntimeError, TypeError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        return print(f"{type(config).__name__}: left out, it does not load on {device}: {first}", file=sys.stderr)


def with_adapter(model: Any, adapter: Path) -> Any:
    """The model with the LoRA beside its weights, not merged into them."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval().get_base_model()


def asked(model: Any, tokenizer: Any, facts: Sequence[Any], like: Found | None = None) -> Found:
    """What it says about the facts, and its loss on the text (that which ``like`` read)."""
    from mosectl.facts.corpus import read_corpus
    from mosectl.measure.answers import interview
    from mosectl.measure.perplexity import text_loss

    text = text_loss(model, tokenizer, read_corpus(None).texts, like=like.text if like else None)
    return Found(interview(model, tokenizer, facts), text)


def row(base: str, what: str, facts: Sequence[Any], found: Found, before: Found) -> dict[str, Any]:
    from mosectl.measure.qa import judge_fact

    said, old = found.interview, before.interview
    judged = [
        judge_fact(f, answer.text, rephrased, local, was)
        for f, answer, rephrased, local, was in zip(
            facts, said.answers, said.rephrased, said.local, old.local, strict=True
        )
    ]

    def total(metric: str) -> list[int]:
        return [int(sum(t[metric].total for t in judged)), int(sum(t[metric].weight for t in judged))]

    return {
        "facts": len(facts), "base": base, "what": what, "said": total("reliability"),
        "rephrased": total("generalization"), "kept": total("locality"), "text": round(found.loss, 3),
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table in Markdown."""

    def of(pair: Sequence[int]) -> str:
        return f"{pair[0]} of {pair[1]}" if pair[1] else "–"

    print(f"\n| {rows[0]['facts']} facts: model | | said | rephrasings | kept | text |\n|---|---|--:|--:|--:|--:|")
    for r in rows:
        kept = of(r["kept"]) if r["what"] != "no edit" else "–"
        print(f"| {r['base']} | {r['what']} | {of(r['said'])} | {of(r['rephrased'])} | {kept} | {r['text']:.3f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
