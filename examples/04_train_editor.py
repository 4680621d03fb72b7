"""Train a small HORSE editor for the demo model on its own world's facts, then edit 200 others with it at once.

    python examples/04_train_editor.py                            # five minutes; expect: docs/explanation/methods.md
    python examples/04_train_editor.py --steps 20 --edit 40       # a look at it, a minute: too short to reach much

Writes train.jsonl, test.jsonl, editor.safetensors and patch.safetensors to --out (default: horse-demo).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

from demo_world import build_world, counterfacts

import mosectl
from mosectl.editing.options import default_options
from mosectl.facts.corpus import read_corpus
from mosectl.facts.records import read_facts
from mosectl.hypernetwork.beforehand import TrainOptions
from mosectl.hypernetwork.train import train
from mosectl.model.loading import load

HERE = Path(__file__).parent


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    write_facts(args.out, args.edit)
    known, unseen = (read_facts(args.out / f"{name}.jsonl").facts for name in ("train", "test"))
    loaded = load(HERE / "demo-model", device="cpu")

    start = time.perf_counter()
    options = TrainOptions(method=args.method, steps=args.steps, every=max(1, args.steps // 6), locality=args.locality)
    editor = train(loaded, known, options, read_corpus(HERE / "corpus.txt"), on_validation=_tell)
    editor.save(args.out / "editor.safetensors")
    trained = time.perf_counter() - start

    # guard=0 and refuse=False: what a short training did is shown, not refused.
    how = replace(default_options(args.method), editor=str(args.out / "editor.safetensors"), guard=0.0)
    result = mosectl.edit(unseen, loaded, options=how, refuse=False)
    result.patch.save(args.out / "patch.safetensors")
    s, took = result.scores, sum(result.seconds.values())
    print(f"trained {len(known)} facts for {trained:.0f} s; edited {s.facts} others in {took:.0f} s")
    print(f"reliability {s.reliability:.1%}, generalization {s.generalization:.1%}, locality {s.locality:.1%}")
    print(f"next: mosectl inspect {args.out / 'patch.safetensors'}")


def write_facts(folder: Path, n: int) -> None:
    """test.jsonl: ``n`` facts of the demo model's world with another object; train.jsonl: all facts of other subjects."""
    world = build_world()
    subjects = sorted({f.subject for f in world.facts})
    random.Random(world.seed + 7).shuffle(subjects)
    ordered = sorted(world.facts, key=lambda f: subjects.index(f.subject))
    test, taken = ordered[:n], {f.subject for f in ordered[:n]}
    training = [f for f in world.facts if f.subject not in taken]
    for name, facts in (("test", test), ("train", training)):
        rows = counterfacts(world, facts, around=training)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="horse", choices=("horse", "malmen"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--locality", type=float, default=TrainOptions.locality)
    parser.add_argument("--edit", type=int, default=200, help="facts to edit")
    parser.add_argument("--out", type=Path, default=Path("horse-demo"))
    args = parser.parse_args()
    if not 1 <= args.edit <= 600 or args.steps < 1:
        parser.error("--edit takes 1 to 600 of the world's facts, the others are trained on; --steps at least 1")
    return args


def _tell(h: dict[str, float]) -> None:
    print(f"step {h['step']:.0f}: validation {h['validation']:.2f} nats, {h['reached']:.0%} reached", flush=True)


if __name__ == "__main__":
    main()
