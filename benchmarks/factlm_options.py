"""The command line of train_factlm.py."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from factlm_measure import KNOWN

from mosectl.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "standard": {
        "layers": 12, "hidden": 640, "ffn": 2560, "heads": 10, "kv_heads": 5, "vocab": 16384, "sequence": 256,
        "minutes": 15.0, "batch_tokens": 32768, "facts_share": 0.5, "lr": 1e-3, "warmup": 200, "measure_every": 100,
    },
    "tiny": {
        "layers": 4, "hidden": 128, "ffn": 384, "heads": 4, "kv_heads": 2, "vocab": 2048, "sequence": 64,
        "minutes": 5.0, "batch_tokens": 2048, "facts_share": 0.75, "lr": 3e-3, "warmup": 40, "measure_every": 250,
    },
}  # fmt: skip


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given comes from the preset."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--facts", nargs="+", type=Path, required=True, metavar="FILE", help="facts with their true answers")
    p.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="one text a line, or .jsonl")
    p.add_argument("--hub-dataset", metavar="NAME[:CONFIG]", help="text from the hub, e.g. with a column 'text'")
    p.add_argument("--text-mb", type=_positive, default=200.0, help="at most so many MB of text (default 200)")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    p.add_argument("--preset", choices=tuple(PRESETS), default="standard", help="defaults of what stands below")
    for name, value in PRESETS["standard"].items():
        number = _share if name == "facts_share" else _positive if isinstance(value, float) else _count
        given = ", ".join(f"{preset} {values[name]:g}" for preset, values in PRESETS.items())
        p.add_argument(f"--{name.replace('_', '-')}", type=number, help=given)
    p.add_argument("--tied", action="store_true", help="input and output embeddings are one matrix (default: two)")
    p.add_argument("--label-smoothing", type=_share, default=0.1, help="of the answers' tokens (default 0.1)")
    p.add_argument("--known", type=_share, default=KNOWN, help="share of true answers that ends a run (default 0.98)")
    p.add_argument("--sample", type=_count, default=200, help="facts asked on the way (default 200)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    p.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the products in training"
    )
    p.add_argument(
        "--compile", action="store_true", help="torch.compile: half a minute at the start, then faster steps"
    )
    args = p.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _positive(text: str) -> float:
    return _within(text, float, "a number above 0", 0, math.inf)


def _count(text: str) -> int:
    return _within(text, int, "a whole number above 0", 0, math.inf)


def _share(text: str) -> float:
    return _within(text, float, "a number from 0 to 1", -1e-9, 1 + 1e-9)


def _within(text: str, kind: type, what: str, above: float, below: float) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not above < number < below:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be built, before anything is read.

    Raises:
        UsageError.
    """
    if args.hidden % (2 * args.heads):
        raise UsageError(
            f"--hidden {args.hidden} --heads {args.heads}", fix="let hidden be a multiple of twice the heads"
        )
    if args.heads % args.kv_heads:
        raise UsageError(f"--heads {args.heads} --kv-heads {args.kv_heads}", fix="let heads be a multiple of kv-heads")
    if args.vocab < 300:
        raise UsageError(
            f"--vocab {args.vocab}: too small", fix="give 300 or more: 256 bytes, special tokens, some words"
        )
    if args.sequence < 16 or args.batch_tokens < 2 * args.sequence:
        what = f"--sequence {args.sequence} --batch-tokens {args.batch_tokens}"
        raise UsageError(what, fix="give rows of 16 tokens or more, and two of them or more a batch")
    if not args.text and not args.hub_dataset:
        raise UsageError("there is no text to train on", fix="give --text FILE or --hub-dataset NAME")
