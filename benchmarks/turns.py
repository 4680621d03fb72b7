"""The default method's solve by itself: compact rotations sought from the start, against the dense Newton steps.

    python benchmarks/turns.py                               # SmolLM2-135M's shapes, 12 facts, against the dense form
    python benchmarks/turns.py --shape llama3-8b --facts 10  # the factor of the second moments counts as kept; no dense form

One layer, random numbers: each fact has five contexts whose keys differ a little, and asks for an output displaced by its
own length. CPU seconds of this process; memory is what it holds at most during the solve, the factor and Python included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from peak import peak_bytes, reset_peak

from mosectl.editing.low_rank import Gram
from mosectl.editing.methods import method
from mosectl.editing.methods.base import Columns, LayerProblem, Still, Turner, TurnProblem
from mosectl.linalg.metric import root_of
from mosectl.patch.change import of_rotations

SHAPES = {"smollm2": (576, 1536), "llama3-1b": (2048, 8192), "llama3-8b": (4096, 14336)}
CONTEXTS = 5
DENSE = 2048  # p up to which the dense form is run beside it
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--rank", type=int, default=0, help="largest rank (default: as large as it pays)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    d, p = SHAPES[args.shape]
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, p)
    C = _moment(scale, g)
    W = (torch.randn(d, p, generator=g) / p**0.5).double().to(args.device)
    facts = _facts(W, scale, args.facts, g)
    solver = method("isospectral")
    assert isinstance(solver, Turner)
    options = {**solver.defaults, "rank": args.rank}
    factor, root = _seconds(lambda: root_of(C.to(args.device), options["damping"]))
    gram_took, gram = _seconds(lambda: Gram.of(W))
    told = {"shape": args.shape, "d": d, "p": p, "facts": args.facts, "device": args.device}
    print(json.dumps({**told, "factors, once a layer and base": {"C": round(factor, 2), "W": round(gram_took, 2)}}))
    if p > DENSE:
        del C
    reset_peak(args.device)
    took, (L, R) = _seconds(
        lambda: solver.turns(TurnProblem(W, Still(root, options["preserve"], W), gram, facts, options))
    )
    size = of_rotations(L, R).nbytes
    peak = peak_bytes(args.device)
    reached = _missed(R.right(L.left(W)), facts) / _missed(W, facts)
    row = {"seconds": round(took, 2), "ranks": [L.rank, R.rank], "megabytes of the patch": round(size / 1e6, 2)}
    memory = {"memory of the process, in p × p float32": round(peak / (4 * p * p), 2)} if p > DENSE else {}
    print(json.dumps({"compact": {**row, "missing of what is asked": round(reached, 4), **memory}}))
    if p <= DENSE:
        nothing = torch.zeros(1, dtype=torch.float64)
        asked = LayerProblem(
            W, W, C, nothing.expand(p, p), nothing.expand(d, p), facts.K, facts.V, facts.weight, solver.defaults
        )
        slow, X = _seconds(lambda: solver.update(asked))
        missing = round(_missed(X, facts) / _missed(W, facts), 4)
        dense = {"seconds": round(slow, 2), "missing of what is asked": missing}
        print(json.dumps({"dense": dense, "ratio": round(slow / took, 1)}))


def _moment(scale: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """C (p, p) float32 of keys of these standard deviations (p,): of 4,096 samples at most, and what is expected."""
    X = torch.randn(min(2 * len(scale), 4096), len(scale), generator=g) * scale
    C = X.T @ X / (2 * len(X))
    C.diagonal().add_(scale.square() / 2)
    return C


def _facts(W: torch.Tensor, scale: torch.Tensor, n: int, g: torch.Generator) -> Columns:
    d, p = W.shape
    own = torch.randn(p, n, generator=g).repeat_interleave(CONTEXTS, 1)
    K = ((own + 0.3 * torch.randn(p, n * CONTEXTS, generator=g)) * scale[:, None]).double().to(W)
    H = W @ K
    away = torch.nn.functional.normalize(torch.randn(d, n, generator=g).double().to(W), dim=0)
    V = H + H.norm(dim=0) * away.repeat_interleave(CONTEXTS, 1)
    return Columns(K, V, torch.full((n * CONTEXTS,), 1 / CONTEXTS).double().to(W))


def _missed(W: torch.Tensor, facts: Columns) -> float:
    return float(((W @ facts.K - facts.V).square() * facts.weight).sum())


def _seconds(work: Callable[[], T]) -> tuple[float, T]:
    clock = time.process_time if not torch.cuda.is_available() else time.perf_counter
    start = clock()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


if __name__ == "__main__":
    main()
