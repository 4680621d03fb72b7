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
from collections.abc import Callable, Iterator, Sequence
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
        sets = [prepared(args.model, f, out / name, args) for f, name in ((one, "one"), (Path(args.facts), "many"))]
        if not args.json:
            print(HEAD)
        for found in measure(args.model, sets, args.quantise, args.device, args.dtype):
            print(json.dumps(found) if args.json else line(found), flush=True)


@dataclass(frozen=True)
class Edit:
    """Facts, and what was made for them."""

    facts: Sequence[Any]
    patch: Any
    adapter: Path
    merged: Path


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


def prepared(model: str, facts: Path, out: Path, args: argparse.Namespace) -> Edit:
    """Patch, adapter and edited checkpoint, unless they are there; ``out`` begins the names of the files."""
    from mosectl.checkpoints.export import export
    from mosectl.facts.records import as_facts
    from mosectl.patch.file import Patch

    patch, adapter, merged = (out.with_name(f"{out.name}{end}") for end in (".safetensors", "-lora", "-merged"))
    where = ("--device", args.device, "--dtype", args.dtype)
    made(patch, "edit", facts, "--model", model, "-o", patch, *where)
    loaded = Patch.load(patch)
    for folder, form in ((adapter, "lora"), (merged, "merged")):
        if not folder.exists():
            export([loaded], model, folder, form)
    return Edit(as_facts(facts, "ask about"), loaded, adapter, merged)


def measure(
    model: str, sets: Sequence[Edit], kinds: Sequence[str], device: str, dtype: str
) -> Iterator[dict[str, Any]]:
    """A row a model and set of facts, as soon as it is there."""
    from mosectl.checkpoints.live import patched
    from mosectl.model.loading import DTYPES, load

    loaded = load(model, device=device, dtype=dtype)
    tokenizer, folder = loaded.tokenizer, loaded.checkpoint.folder  # type: ignore[union-attr]
    text = loss(loaded.model, tokenizer)
    for edit in sets:
        full = asked(loaded.model, tokenizer, edit, text)
        yield row("full", "no edit", edit, full, full)
        with patched(loaded.model, edit.patch):
            yield row("full", "with the patch", edit, asked(loaded.model, tokenizer, edit, like=text), full)
    del loaded
    for kind in kinds:

        def quantised(at: Path, config: Callable[[Any], Any] = KINDS[kind][1]) -> Any:
            return load_quantised(at, config(DTYPES[dtype]), device, DTYPES[dtype])

        here = None
        for edit in sets:
            if (rounded := quantised(folder)) is None:
                break
            # The adapter first: bitsandbytes 0.50 packs weights when a CPU first uses them, which loading one then spoils.
            model_with = with_adapter(rounded, edit.adapter)
            with model_with.disable_adapter():
                here = here or loss(rounded, tokenizer, text)
                plain = asked(rounded, tokenizer, edit, here)
            yield row(kind, "no edit", edit, plain, plain)
            yield row(kind, "with the adapter", edit, asked(rounded, tokenizer, edit, like=text), plain)
            del rounded, model_with
            gc.collect()
            if (later := quantised(edit.merged)) is not None:
                yield row(kind, "edited, then quantised", edit, asked(later, tokenizer, edit, like=text), plain)


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
    """PEFT's wrapper; it puts the LoRA into ``model``, beside its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


def loss(model: Any, tokenizer: Any, like: Any = None) -> Any:
    """TextLoss of the embedded corpus, or of the part of it that ``like`` read."""
    from mosectl.facts.corpus import read_corpus
    from mosectl.measure.perplexity import text_loss

    return text_loss(model, tokenizer, read_corpus(None).texts, like=like)


def asked(model: Any, tokenizer: Any, edit: Edit, text: Any = None, like: Any = None) -> Found:
    """What it says about the facts; its loss on the text is taken unless it is given."""
    from mosectl.measure.answers import interview

    return Found(interview(model, tokenizer, edit.facts), text or loss(model, tokenizer, like))


def row(base: str, what: str, edit: Edit, found: Found, before: Found) -> dict[str, Any]:
    from mosectl.measure.qa import judge_fact

    said, old = found.interview, before.interview
    heard = zip(edit.facts, said.answers, said.rephrased, said.local, old.local, strict=True)
    judged = [judge_fact(f, answer.text, rephrased, local, was) for f, answer, rephrased, local, was in heard]

    def total(metric: str) -> list[int]:
        return [int(sum(t[metric].total for t in judged)), int(sum(t[metric].weight for t in judged))]

    return {
        "facts": len(edit.facts), "base": base, "what": what, "said": total("reliability"),
        "rephrased": total("generalization"), "kept": total("locality") if found is not before else [0, 0],
        "text": round(sum(t.total for t in found.text.texts) / sum(t.weight for t in found.text.texts), 3),
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of a table in Markdown."""

    def of(pair: Sequence[int]) -> str:
        return f"{pair[0]} of {pair[1]}" if pair[1] else "–"

    counts = " | ".join(of(found[name]) for name in ("said", "rephrased", "kept"))
    return f"| {found['facts']} | {found['base']} | {found['what']} | {counts} | {found['text']:.3f} |"


HEAD = "| facts | model | | said | rephrasings | kept | text |\n|--:|---|---|--:|--:|--:|--:|"

if __name__ == "__main__":
    from mosectl.errors import MosectlError

    try:
        main()
    except MosectlError as e:
        sys.exit(f"error {e}")
