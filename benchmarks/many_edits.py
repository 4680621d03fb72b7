"""What a batch takes after so many facts: time and memory of its solves and of the care for earlier facts.

    python benchmarks/many_edits.py                          # SmolLM2-135M's shapes, one layer, after 10 to 10,000 facts
    python benchmarks/many_edits.py --shape llama3-1b --after 10 1000

Keys are random, of a falling spectrum, five contexts a fact; the model is a random one of two layers. The facts before are
put where a run would have left them: in the sums, in the columns that are kept, in the rotations so far. CPU seconds of
this process; bytes are of what a run holds from batch to batch, and of its .progress file. A batch's targets and statistics
are not here: they do not depend on the facts before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from speed import DEMO, random_llama
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig
from turns import CONTEXTS, SHAPES, _facts, _moment

from mosectl.editing.contexts import Contexts, build_contexts, rows_of
from mosectl.editing.methods import method
from mosectl.editing.methods.base import Turner
from mosectl.editing.previous_edits import STORED, Earlier
from mosectl.editing.resume import Progress, State
from mosectl.editing.turns import LayerTurns, Sums
from mosectl.facts.records import Fact
from mosectl.linalg.rotation import Compact, times
from mosectl.model.architecture import resolve

BATCH, ROUNDS, WEIGHT = 10, 4, 50.0
RANK = 45  # of what a batch adds to either rotation, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--after", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    args = parser.parse_args()
    first: dict[str, Any] = {}
    for n in args.after:
        row = _batch(*SHAPES[args.shape], n)
        first = first or row
        ratios = {name: round(value / first[name], 2) for name, value in row.items()}
        print(json.dumps({"shape": args.shape, "facts before": n, **row, "ratio": ratios}), flush=True)


def _batch(d: int, p: int, n: int) -> dict[str, float]:
    """Seconds and megabytes of the batch that follows ``n`` facts."""
    g = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=p, num_hidden_layers=2, num_attention_heads=d // 64, num_key_value_heads=d // 64,
        tie_word_embeddings=True, vocab_size=8192,
    )  # fmt: skip
    loaded = random_llama(config, "cpu", torch.bfloat16, AutoTokenizer.from_pretrained(DEMO / "demo-model"))
    projection = resolve(loaded.model).projections[1]
    scale = torch.logspace(0, -2, p)
    W = (torch.randn(d, p, generator=g) / p**0.5).double()
    solver = method("isospectral")
    assert isinstance(solver, Turner)
    turns = LayerTurns(projection.name, W)
    turns.take(*(_rotation(size, RANK * n // BATCH, g) for size in (d, p)))
    earlier = Earlier(loaded.model, [projection])
    _fill(earlier, _contexts(loaded, n), turns.begun, scale, projection.name, g)
    C, batch = {projection.name: _moment(scale, g)}, _contexts(loaded, BATCH)
    turns.solve(solver, C, _facts(W, scale, 1, g), _sums(earlier, projection.name), 1.0, solver.defaults)
    turns.take(turns.left, turns.right)  # the factor of C is there now, as in every batch but the first
    took = {"care for earlier facts, s": 0.0, "solve, s": 0.0, "progress file, s": 0.0}
    start = time.process_time()
    earlier.slipped(1.0)
    sums = _sums(earlier, projection.name)
    took["care for earlier facts, s"] = time.process_time() - start
    start, facts = time.process_time(), _facts(W, scale, BATCH, g)
    for _r in range(ROUNDS):
        turns.solve(solver, C, facts, sums, 1.0, solver.defaults)
    W = turns.keep()
    took["solve, s"] = time.process_time() - start
    start = time.process_time()
    earlier.add(batch, [5.0] * BATCH, {projection.name: W})
    took["care for earlier facts, s"] += time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / "patch.safetensors.progress", time.process_time()
        n = len(earlier.failures)
        state = State({projection.name: W}, {projection.name: turns.tensors()}, earlier.kept(), [], [0.0] * n, [""] * n)
        Progress(file).save({}, state)
        took["progress file, s"] = time.process_time() - start
        size = file.stat().st_size
    held = [*earlier.keys.values(), *earlier.values.values(), *(x for pair in earlier.sums.values() for x in pair)]
    held += [x for c in [earlier.contexts] if c for x in (*vars(c.batch).values(), c.positions, c.targets, c.fact)]
    held += list(turns.tensors().values())
    took = {"all, s": sum(took.values()), **took}
    return {name: round(s, 2) for name, s in took.items()} | {
        "held, MB": round(sum(x.nbytes for x in held) / 1e6, 1), "progress file, MB": round(size / 1e6, 1),
    }  # fmt: skip


def _sums(earlier: Earlier, name: str) -> Sums:
    return earlier.moments(WEIGHT)[name]


def _rotation(size: int, rank: int, g: torch.Generator) -> Tensor | Compact:
    """A random one, in the form that so many batches leave."""
    rank = min(rank, size)
    U = torch.linalg.qr(torch.randn(size, rank, generator=g).double())[0]
    A = 0.1 * torch.randn(rank, rank, generator=g).double() / rank**0.5
    R = Compact(U, torch.linalg.matrix_exp(A - A.T))
    return times(R, Compact(U[:, :1], torch.ones(1, 1).double()))


def _contexts(loaded: Any, n: int) -> Contexts:
    """Those of ``n`` facts: the first's, as often."""
    facts = [Fact("The town of Number 7 lies near", "Number 7", "Paris")]
    prefixes = ["", *("It was a long road through the hills. " for _ in range(CONTEXTS - 1))]
    c = build_contexts(loaded.model, loaded.tokenizer, facts, prefixes, last=True)
    rows = torch.arange(len(c.fact)).repeat(n)
    many = rows_of(c, rows)
    many.fact.copy_(torch.arange(n).repeat_interleave(len(c.fact)))
    return many


def _fill(earlier: Earlier, contexts: Contexts, W: Tensor, scale: Tensor, name: str, g: torch.Generator) -> None:
    """As a run would have left it: contexts and leads of all facts, columns of the last, and the sums."""
    n = int(contexts.fact.max()) + 1
    earlier.contexts, earlier.failures = contexts, [0] * n
    earlier.leads = torch.rand(n, generator=g).mul(9).add(1).tolist()
    earlier.turn, earlier.summed = n // BATCH, n
    P, Q = torch.zeros(len(scale), len(scale)).double(), torch.zeros(*W.shape).double()
    for start in range(0, n, STORED):
        m = min(STORED, n - start)
        facts = _facts(W, scale, m, g)
        K = facts.K.bfloat16().double()  # as the model has them
        P += (K * facts.weight) @ K.T
        Q += (facts.V * facts.weight) @ K.T
        earlier.column = torch.arange(start, start + m).repeat_interleave(CONTEXTS)
        earlier.keys, earlier.values = {name: K.bfloat16()}, {name: facts.V}
    earlier.sums = {name: (P, Q)}


if __name__ == "__main__":
    main()
