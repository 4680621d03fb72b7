"""Train a stand-in that knows the facts of your files: a Llama of 50 to 150 M parameters in 15 minutes on a GPU.

    python benchmarks/train_factlm.py --facts counterfact.json --text wiki.txt -o factlm-100m
    python benchmarks/train_factlm.py --facts facts.jsonl --text wiki.txt -o tiny --preset tiny --minutes 5      # a CPU

It learns the TRUE statements (prompt, rephrasings and locality prompts with their true answers) among ordinary text, and
stops when it knows them, so that a new target is as unlikely as in a real model, not impossible. To the same end the
labels of answers are smoothed towards how often each token stands in an answer: spread evenly over a whole vocabulary, the
smoothing would leave a new target at -ln(0.1/16384) = 12 nats.
Ctrl-C ends the training and writes what there is; a second one leaves at once.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from factlm_data import (
    IGNORED,
    KnownFacts,
    Packer,
    Rows,
    Statements,
    encode_all,
    read_known,
    read_text,
    sentence,
    statements,
    train_tokenizer,
)
from factlm_measure import Measured, measure, table
from factlm_options import check, parse
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from mosectl.errors import MosectlError, UsageError
from mosectl.model.loading import pick_device
from mosectl.storage.folders import new_folder

ANSWER_WEIGHT = 3.0  # answers are few tokens among many that cannot be known


# Model and loss.


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, device: str) -> LlamaForCausalLM:
    """A random Llama, float32, on ``device``."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(512, args.sequence),
        tie_word_embeddings=args.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # PyTorch's fused attention is slow backwards on a CPU when rows are this short.
    attention = "eager" if device == "cpu" else "sdpa"
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    model.generation_config.do_sample = False
    return model.to(device)


def new_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def loss_of(logits: Tensor, rows: Rows, frequencies: Tensor, smoothing: float) -> Tensor:
    """Mean loss a token, nats; answers weigh more, their labels are smoothed towards ``frequencies``.

    Args:
        logits: (B, T, V). frequencies: (V,), of tokens in answers.
    """
    flat, labels = logits.flatten(0, 1), rows.labels.flatten()
    losses = F.cross_entropy(flat.float(), labels, reduction="none", ignore_index=IGNORED)
    weights = (labels != IGNORED).float()
    weights[rows.answers] = ANSWER_WEIGHT
    if smoothing:
        answers = flat[rows.answers].float()
        prior = answers.logsumexp(-1) - answers @ frequencies
        losses = losses.index_add(0, rows.answers, smoothing * (prior - losses[rows.answers]))
    return (losses * weights).sum() / weights.sum()


# Training.


@dataclass
class Run:
    """One training: what it works with, and how far it came."""

    args: argparse.Namespace
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    packer: Packer
    frequencies: Tensor  # (V,), on the model's device
    sample: list[Any]  # facts asked on the way
    device: str
    began: float  # time.perf_counter() at the start of the program
    ended: str = "time"
    steps: int = 0
    seconds: float = 0.0  # in training and in measuring on the way
    history: list[dict[str, Any]] = field(default_factory=list)  # step, loss, and from the second on what is known

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.args.batch_tokens // self.args.sequence

    @property
    def tokens(self) -> int:
        """Tokens gone through so far, padding included."""
        return self.steps * self.rows * self.args.sequence

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        wanted = self.args.dtype == "bfloat16" or (self.args.dtype == "auto" and self.device.startswith("cuda"))
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=wanted)

    def ask(self) -> Measured:
        self.model.eval()
        with self.autocast:
            measured, _ = measure(self.model, self.tokenizer, self.sample)
        self.model.train()
        return measured


def train(run: Run) -> None:
    """Train until the time is over, the facts are known or Ctrl-C; the time counts from the start of the program."""
    args, start = run.args, time.perf_counter()
    end = run.began + 60 * args.minutes
    forward = torch.compile(run.model) if args.compile else run.model
    optimizer = new_optimizer(run.model.train(), args.lr)
    recent = torch.zeros((), device=run.device)
    with stop_requested() as stop:
        while (now := time.perf_counter()) < end or run.steps == 0:
            done = min(1.0, (now - start) / max(1e-9, end - start))
            rate = args.lr * min(1, (run.steps + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 0.01 * args.lr)
            loss = _step(run, forward, optimizer)
            recent = loss if run.steps == 0 else 0.95 * recent + 0.05 * loss
            run.steps += 1
            if run.steps == 1 or run.steps % args.measure_every == 0:
                _report(run, recent.item(), start, end)
            if stop:
                run.ended = "interrupted"
            elif run.history[-1].get("known", 0) >= args.known:
                run.ended = "known"
            if run.ended != "time":
                break
    run.history.append({"step": run.steps, "loss": recent.item()})
    run.seconds = time.perf_counter() - start
    run.model.eval()


def _step(run: Run, forward: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of the optimizer; its loss, on the device so that nobody waits for it."""
    rows = run.packer.batch(run.rows).to(run.device)
    with run.autocast:
        logits = forward(input_ids=rows.tokens, use_cache=False).logits
    loss = loss_of(logits, rows, run.frequencies, run.args.label_smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _report(run: Run, loss: float, start: float, end: float) -> None:
    """A line of progress; from the second on with what is known."""
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss} after {run.steps} steps", fix="give a smaller --lr")
    now = time.perf_counter()
    run.history.append({"step": run.steps, "loss": loss, "seconds": round(now - start, 1)})
    speed = run.tokens / (now - start)
    line = f"step {run.steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  at most {max(0, end - now):.0f} s left"
    if run.steps > 1:
        measured = run.ask()
        run.history[-1] |= measured.as_dict()
        line += f"  {measured}"
    print(line, file=sys.stderr, flush=True)


@contextmanager
def stop_requested() -> Iterator[list[bool]]:
    """A list that Ctrl-C fills, so that no step is cut in two; the second Ctrl-C is an ordinary one."""
    pressed: list[bool] = []

    def press(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)
        print("Ctrl-C: writing what there is; once more leaves at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# From files to a folder.


def prepare(args: argparse.Namespace, known: KnownFacts, device: str, began: float) -> Run:
    """Text, tokenizer, rows and a new model."""
    texts = read_text(args.text, args.hub_dataset, args.text_mb)
    pairs = statements(known.facts)
    # Statements twice: at the start of a text and behind another one, as they are trained.
    told = [lead + sentence(*pair) for lead in ("", " ") for pair in pairs]
    tokenizer = train_tokenizer([*told, *texts], args.vocab, max(512, args.sequence))
    facts = Statements(pairs, tokenizer)
    torch.manual_seed(args.seed)
    model = new_model(args, tokenizer, device)
    encoded = encode_all(tokenizer, texts)
    packer = Packer(
        facts, encoded, tokenizer.pad_token_id, length=args.sequence, share=args.facts_share, seed=args.seed
    )
    sample = random.Random(args.seed).sample(known.facts, min(args.sample, len(known.facts)))
    left_out = f" ({known.left_out} entries left out: unusable, repeated or without a true answer)"
    print(
        f"{len(known.facts):,} facts{left_out if known.left_out else ''}, {len(pairs):,} statements of "
        f"{sum(map(len, facts.first)) + sum(map(len, facts.answers)):,} tokens, {sum(map(len, encoded)):,} tokens of text, "
        f"{len(tokenizer):,} tokens in the vocabulary, {model.num_parameters() / 1e6:.1f} M parameters",
        file=sys.stderr,
        flush=True,
    )
    frequencies = facts.frequencies(len(tokenizer)).to(device)
    return Run(args, model, tokenizer, packer, frequencies, sample, device, began)


def finish(run: Run, known: KnownFacts, folder: Path) -> str:
    """Write model, tokenizer, facts-known.jsonl and training.json into ``folder``; returns the table."""
    run.model.bfloat16().save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if run.device == "cpu":
        run.model.float()  # the same numbers, and much faster here
    measured, knows = measure(run.model, run.tokenizer, known.facts)
    rows = [row for row, yes in zip(known.rows, knows, strict=True) if yes]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "facts-known.jsonl").write_text("".join(lines), encoding="utf-8")
    took = {
        "ended": {"known": "the facts are known", "time": "the time was over"}.get(run.ended, run.ended),
        "facts in facts-known.jsonl": f"{len(rows):,} of {len(known.facts):,}",
        "parameters": f"{run.model.num_parameters():,}",
        "steps": f"{run.steps:,}; {run.tokens:,} tokens, {run.tokens / run.seconds:,.0f} a second",
        "seconds": f"{time.perf_counter() - run.began:.0f}, of these {run.seconds:.0f} in training",
    }
    options = {k: [str(p) for p in v] if isinstance(v, list) else v for k, v in vars(run.args).items() if k != "output"}
    record = {
        "options": options, "seed": run.args.seed, "ended": run.ended, "steps": run.steps,
        "device": _device_name(run.device),
        "parameters": run.model.num_parameters(), "tokens": run.tokens, "tokens_per_second": round(run.tokens / run.seconds),
        "seconds": {"all": round(time.perf_counter() - run.began, 1), "training": round(run.seconds, 1)},
        "facts": len(known.facts), "facts_known": len(rows), "measured": measured.as_dict(),
        "history": run.history, "torch": torch.__version__,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return table(measured, took)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}), {torch.get_num_threads()} threads"


def build(args: argparse.Namespace) -> int:
    """Everything in order; the folder appears when all of it is there."""
    began = time.perf_counter()
    logging.disable_progress_bar()
    check(args)
    device = pick_device(args.device)
    if device == "balanced":
        raise UsageError("--device balanced: it trains on one device", fix="choose auto, cpu, cuda, cuda:1 or mps")
    known = read_known(args.facts)
    with new_folder(args.output) as folder:
        run = prepare(args, known, device, began)
        train(run)
        result = finish(run, known, folder)
    print(result)
    print(f"written: {args.output}")
    return 130 if run.ended == "interrupted" else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, as mosectl's."""
    args = parse(__doc__ or "", arguments)
    try:
        return build(args)
    except MosectlError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except torch.OutOfMemoryError:
        print("error: out of GPU memory\n  → give a smaller --batch-tokens or --sequence", file=sys.stderr)
        return UsageError.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
