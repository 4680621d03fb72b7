"""How fast each part of mosectl is here, every figure as a ratio of two things run in this same process.

    python benchmarks/speed.py                              # all parts, on the demo model and a random one of 12 layers
    python benchmarks/speed.py targets solve --device cuda  # some of them
    python benchmarks/speed.py --model FOLDER --facts FACTS # on a model of yours

`make bench` runs it. A random model has real shapes and no knowledge: its edits take every step they may, which is the
slow case, and reach nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mosectl.checkpoints.apply import apply
from mosectl.editing import targets
from mosectl.editing.contexts import build_contexts
from mosectl.editing.edit import edit
from mosectl.editing.edited_layers import metric_of
from mosectl.editing.layers import MARGINS, SUBJECT
from mosectl.editing.options import default_options, options_from
from mosectl.editing.second_moments import second_moments
from mosectl.editing.targets import optimise_targets
from mosectl.facts.corpus import read_corpus
from mosectl.facts.records import Fact, as_facts
from mosectl.linalg.rotation import nearest_rotation, orthogonality_error, polar
from mosectl.model.architecture import parse_layers, resolve
from mosectl.model.edit_site import Projection
from mosectl.model.forward import input_device
from mosectl.model.loading import Loaded, load, pick_device
from mosectl.model.partial_forward import Suffix
from mosectl.patch.file import Patch

DEMO = Path(__file__).parents[1] / "examples"
REPEATS = 3  # the fastest counts: other work on the machine only ever slows
PARTS = ("targets", "statistics", "solve", "apply", "edit")
SHAPES = {  # hidden, FFN, layers, heads, keys' heads, vocabulary
    "tiny": (64, 160, 4, 4, 2, 2_000),
    "small": (512, 1536, 12, 8, 4, 32_000),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128_256),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128_256),
    "llama3-70b": (8192, 28672, 80, 64, 8, 128_256),
}


@dataclass(frozen=True)
class Row:
    part: str
    what: str
    figure: str
    ratio: str = ""


def main() -> None:
    args = _arguments()
    rows: list[Row] = []
    for part in args.parts or PARTS:
        for row in globals()[f"bench_{part}"](args):
            rows.append(row)
            print(json.dumps(vars(row)), flush=True)
    table = Table("part", "what", "figure", "ratio", title=f"{_device(args.device)}, torch {torch.__version__}")
    for row in rows:
        table.add_row(row.part, row.what, row.figure, row.ratio)
    Console(stderr=True).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", default="small", help="folder, hub id, or a random model: small, llama3-8b")
    parser.add_argument("--facts", type=Path, default=DEMO / "facts.jsonl")
    parser.add_argument("--layers", default="3-5", help="edited layers")
    parser.add_argument("--limit", type=int, default=16, help="facts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="d of the solves")
    return parser.parse_args()


def _device(device: str) -> str:
    if pick_device(device) == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def model_of(name: str, device: str) -> Loaded:
    """A model folder or hub id; or random weights of a Llama's shapes, made on the device in its own type."""
    if name not in SHAPES:
        return load(name, device=device)
    from transformers import AutoTokenizer

    place = pick_device(device)
    dtype = torch.float32 if place == "cpu" else torch.bfloat16
    return random_llama(llama_config(name), place, dtype, AutoTokenizer.from_pretrained(DEMO / "demo-model"))


def llama_config(name: str, depth: int | None = None) -> Any:
    """The configuration of a shape, with ``depth`` layers where they shall be fewer."""
    from transformers import LlamaConfig

    d, p, n, heads, kv, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=d, intermediate_size=p, num_hidden_layers=depth or n, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip


def random_llama(config: Any, device: str, dtype: torch.dtype, tokenizer: Any) -> Loaded:
    """Random weights, made on the device in their own type: no copy in float32 stands beside them."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    return Loaded(model.eval(), tokenizer, None)


def _facts(args: argparse.Namespace) -> Sequence[Fact]:
    return as_facts(args.facts, "edit")[: args.limit]


def _chosen(loaded: Loaded, layers: str) -> list[Projection]:
    projections = resolve(loaded.model).projections
    chosen = parse_layers(layers, len(projections)) or ()
    return [p for p in projections if p.layer in chosen]


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _fastest(work: Callable[[], Any]) -> tuple[float, Any]:
    return min((_seconds(work) for _ in range(REPEATS)), key=lambda timed: timed[0])


# targets


def bench_targets(args: argparse.Namespace) -> Iterator[Row]:
    """The same optimiser on the same facts: as known implementations run it, and with each of our savings."""
    loaded, facts = model_of(args.model, args.device), _facts(args)
    arch, projections = resolve(loaded.model), _chosen(loaded, args.layers)
    corpus = read_corpus(None)
    moments = second_moments(loaded.model, loaded.tokenizer, projections, corpus, max_tokens=4096, cache=False)
    metric = {p.name: metric_of(moments.G[p.name].double()) for p in projections}
    prefixes = ["", *(" ".join(t.split()[:6]) + ". " for t in corpus.texts[:2])]
    options = replace(default_options().targets, steps=10, margin=MARGINS[SUBJECT])

    def run(group: int) -> tuple[float, str]:
        def work() -> str:
            before = total = 0.0
            for start in range(0, len(facts), group):
                contexts = build_contexts(loaded.model, loaded.tokenizer, facts[start : start + group], prefixes)
                found = optimise_targets(loaded.model, arch, projections, contexts, options, metric=metric)
                before, total = before + float(found.loss_before.sum()), total + float(found.loss.sum())
            return f"loss {before / len(facts):.3f} to {total / len(facts):.3f}"

        return _fastest(work)

    run(len(facts))  # warm
    with _as_others_do():
        slow, loss = run(1)
    n = len(facts)
    yield Row(
        "targets",
        "reference: one fact, all layers, all tokens, all logits",
        f"{n / slow:.2f} facts/s, {loss}",
        "1",
    )
    for group in sorted({1, 4, n}):
        fast, loss = run(group)
        what = f"{group} fact{'s' * (group > 1)} at once, layers above the edit, tokens from the subject on"
        yield Row("targets", what, f"{n / fast:.2f} facts/s, {loss}", f"{slow / fast:.1f}x")


@contextmanager
def _as_others_do() -> Iterator[None]:
    """Full forwards: nothing skipped, logits of every token of the sequence."""

    class Whole(Suffix):
        def __init__(self, model: Any, arch: Any, first: int, batch: Any, *_: Any) -> None:
            super().__init__(model, arch, 0, batch)

        def logits(self, rows: torch.Tensor, positions: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
            logits = self.model(**self.batch.rows(rows).kwargs()).logits.float()  # (rows, tokens, vocabulary)
            return logits[torch.arange(len(rows))[:, None], positions][asked]

    ours, targets.Suffix = targets.Suffix, Whole  # type: ignore[misc]
    try:
        yield
    finally:
        targets.Suffix = ours  # type: ignore[misc]


# statistics


def bench_statistics(args: argparse.Namespace) -> Iterator[Row]:
    loaded = model_of(args.model, args.device)
    projections, corpus, tokens = _chosen(loaded, args.layers), read_corpus(None), 8192
    ids = torch.randint(3, 300, (8, 256), device=input_device(loaded.model))

    def forward() -> None:
        with torch.no_grad():
            for _ in range(tokens // ids.numel()):
                loaded.model(ids, use_cache=False)

    plain, _ = _seconds(forward)
    ours, found = _seconds(
        lambda: second_moments(loaded.model, loaded.tokenizer, projections, corpus, max_tokens=tokens, cache=False)
    )
    yield Row("statistics", "reference: forwards of the whole model", f"{tokens / plain:,.0f} tokens/s", "1")
    rate = found.tokens / ours
    yield Row(
        "statistics", f"C and G of {len(projections)} layers", f"{rate:,.0f} tokens/s", f"{rate * plain / tokens:.2f}x"
    )


# solve


def bench_solve(args: argparse.Namespace) -> Iterator[Row]:
    """The polar factor of λS + V Hᵀ, float64: torch's SVD against the iteration used on GPUs; and a compact rotation's."""
    device = pick_device(args.device)
    for d in args.sizes:
        g = torch.Generator().manual_seed(d)
        A = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
        H, V = (torch.randn(d, 16, generator=g, dtype=torch.float64) for _ in range(2))
        M = (A @ A.T / d + 0.01 * torch.eye(d, dtype=torch.float64) + V @ H.T).to(device)
        _svd(M), polar(M)  # warm
        slow, R = _fastest(lambda M=M: _svd(M))
        fast, X = _fastest(lambda M=M: polar(M))
        yield Row("solve", f"d = {d}: SVD", f"{1e3 * slow:.0f} ms, ‖RᵀR − I‖/√d {orthogonality_error(R):.0e}", "1")
        apart = float((X - R).norm() / d**0.5)
        figure = f"{1e3 * fast:.0f} ms, ‖RᵀR − I‖/√d {orthogonality_error(X):.0e}, from the SVD's {apart:.0e}"
        yield Row("solve", f"d = {d}: scaled Newton and Newton-Schulz", figure, f"{slow / fast:.1f}x")
        few = M[:32, :32].contiguous()  # 16 facts: what they read and write
        short, X = _fastest(lambda few=few: nearest_rotation(few))
        figure = f"{1e3 * short:.1f} ms, ‖RᵀR − I‖/√d {orthogonality_error(X):.0e}"
        yield Row("solve", f"d = {d}: within 32 directions (a compact rotation)", figure, f"{slow / short:,.0f}x")


def _svd(M: torch.Tensor) -> torch.Tensor:
    U, _, Zh = torch.linalg.svd(M)
    return U @ Zh


# apply


def bench_apply(args: argparse.Namespace) -> Iterator[Row]:
    """A patch of the demo model's edit on the demo model, against copying its file."""
    source = DEMO / "demo-model"
    patch = Patch.load(DEMO.parent / "patches" / "demo.safetensors")
    size = (source / "model.safetensors").stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        copies = [
            _seconds(lambda i=i: shutil.copyfile(source / "model.safetensors", f"{folder}/{i}"))[0] for i in range(5)
        ]
        applies = [_seconds(lambda i=i: apply([patch], source, f"{folder}/a{i}", proof=False))[0] for i in range(5)]
    copy, ours = min(copies), min(applies)
    yield Row("apply", f"reference: cp of {size / 1e6:.0f} MB", f"{1e3 * copy:.0f} ms", "1")
    yield Row("apply", "apply (20 GB: benchmarks/apply_20gb.py)", f"{1e3 * ours:.0f} ms", f"{copy / ours:.2f}x")


# end to end

# mosectl's variant: the published one is as good as idle on a small model (docs/explanation/methods.md).
MEMIT = ["optimizer=adam", "steps=20", "step_size=0.25", "decay=0.02", "prefixes=2", "preserve=1"]


def bench_edit(args: argparse.Namespace) -> Iterator[Row]:
    """A whole edit, what it reached, its phases, its patch and what it takes of memory."""
    random = args.model in SHAPES  # knows nothing: the demo model's answers are asked instead
    loaded, facts = (
        load(DEMO / "demo-model", device=args.device) if random else model_of(args.model, args.device),
        _facts(args),
    )
    slow = 0.0
    for name, how in (("isospectral", "steps"), ("isospectral", "gradient"), ("mose", "steps"), ("memit", "steps")):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        variant = MEMIT if name == "memit" else []
        options = options_from(variant, method=name, targets=how, layers=None if random else args.layers)
        result = edit(facts, loaded, options=options, refuse=False)
        took = sum(result.seconds.values()) - result.seconds["statistics"]  # those are kept: once a model
        slow = slow or took
        size = sum(c.nbytes for c in result.patch.changes.values())
        called = f"{name}, our variant" if variant else name
        s, what = result.scores, f"{called}, {len(facts)} facts" + (", --targets gradient" if how == "gradient" else "")
        reached = "/".join(f"{100 * x:.0f}" for x in (s.reliability, s.generalization, s.locality) if x is not None)
        figure = f"{len(facts) / took:.2f} facts/s, patch {size / 1e6:.2f} MB, rel/gen/loc {reached} %"
        yield Row("edit", what, figure, f"{slow / took:.1f}x")
        phases = ", ".join(f"{k} {v:.1f}" for k, v in result.seconds.items() if v >= 0.05)
        yield Row("edit", "    seconds (statistics not counted above)", phases)
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    yield Row("edit", "peak memory of the last edit (on a CPU: of this process)", f"{peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
