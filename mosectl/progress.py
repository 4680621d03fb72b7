"""A run between two batches, on disk: an interrupted edit goes on from there to the very same patch.

One safetensors file beside the patch holds what a batch leaves behind: the weights so far in float64, and the earlier facts'
rows and values. Its record says what it belongs to: it is never continued with other facts, settings or weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosectl import __version__, schema
from mosectl.errors import OutputError
from mosectl.facts import Fact
from mosectl.fingerprint import sha256
from mosectl.forward import Batch, input_device
from mosectl.guard import Health
from mosectl.state_file import damaged, read_state, write_state
from mosectl.targets import Contexts

if TYPE_CHECKING:
    from mosectl.run import Run

KIND = "progress"
_EACH = schema.mapping(schema.number)  # by module path
_POINT = {"edits": schema.integer, "loss": schema.number, "norm": _EACH, "condition": _EACH}
RECORD = schema.record(
    {
        "belongs": schema.mapping(schema.text), "losses": schema.listed(schema.number),
        "failures": schema.listed(schema.integer), "curve": schema.listed(schema.record(_POINT, others=schema.anything)),
    },
    others=schema.anything,
)  # fmt: skip
ROWS, WIDTH = 1000, 16_384  # of a fact, at most: its rows, and a row's bytes but for what is written there
_ROWS = [f.name for f in fields(Contexts) if f.name != "batch"]
_START = "give --overwrite to start again"
_AGAIN = "finish it with what it was begun with, or give --overwrite to start again"


def beside(out: Path) -> Path:
    """Where the state of a run that will write the patch ``out`` is kept."""
    return out.with_name(f"{out.name}.progress")


@dataclass(frozen=True)
class Progress:
    """Where a run's state is kept, and whether one that is there is continued."""

    path: Path
    resume: bool = False

    @staticmethod
    def belongs(run: Run, facts: Sequence[Fact]) -> dict[str, str]:
        """What a kept state belongs to, to be compared and kept with it: hashes, by name."""

        def digest(value: Any) -> str:
            return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

        asked = [{k: v for k, v in f.fields().items() if k != "source"} for f in facts]
        return {
            "facts": digest(asked),
            "settings": digest([asdict(run.options), [p.name for p in run.projections]]),
            "weights": digest([sha256(w) for w in run.stored.values()]),
            "statistics": digest([sha256(C) for C in run.C.values()]),
            "version of mosectl": __version__,
        }

    def load(self, run: Run, ours: Mapping[str, str], facts: int) -> list[float]:
        """Put a kept state into a run of so many facts that has not begun; returns the losses of those it has edited.

        Raises:
            OutputError: the state is of other facts, settings or weights, or damaged.
        """
        if not self.resume or not os.path.lexists(self.path):
            return []
        a_fact = ROWS * (8 * sum(W.shape[0] for W in run.W.values()) + WIDTH)
        limit = 8 * sum(W.numel() for W in run.W.values()) + facts * a_fact + 10**7
        record, tensors = read_state(self.path, KIND, RECORD, _START, limit)
        if other := [name for name in ours if ours[name] != record["belongs"].get(name)]:
            what = f"the interrupted run was one with other {' and '.join(other)}"
            raise OutputError(what, where=str(self.path), fix=_AGAIN)
        if what := _misfit(run, tensors, record, facts):
            raise damaged(self.path, what, _START)
        _put(run, tensors, record)
        return [float(x) for x in record["losses"]]

    def save(self, run: Run, ours: Mapping[str, str], losses: Sequence[float]) -> None:
        """Keep the state of a run after a batch, in place of the one before, atomically."""
        contexts = run.earlier.contexts
        assert contexts is not None
        rows = {name: getattr(contexts, name) for name in _ROWS} | vars(contexts.batch)
        tensors = {
            **{f"W.{name}": W for name, W in run.W.items()},
            **{f"V.{name}": V for name, V in run.earlier.values.items()},
            **{f"rows.{name}": x for name, x in rows.items()},
        }
        record = {
            "belongs": dict(ours),
            "losses": list(losses),
            "failures": run.earlier.failures,
            "curve": [{"edits": n, **asdict(health)} for n, health in run.curve],
        }
        write_state(self.path, KIND, record, tensors)

    def done(self) -> None:
        """The patch is written: nothing is left to continue."""
        self.path.unlink(missing_ok=True)


def _misfit(run: Run, tensors: Mapping[str, Tensor], record: Mapping[str, Any], facts: int) -> str:
    """What in a state that is meant for this run does not go with it; empty if nothing."""
    done, rows, layers = len(record["losses"]), tensors.get("rows.fact", torch.empty(0)).numel(), set(run.W)
    if not 0 < done <= facts or len(record["failures"]) != done:
        return f"{done} losses of {facts} facts"
    points = [h["edits"] for h in record["curve"]]
    if points[-1:] != [done] or any({*h[name]} != layers for h in record["curve"] for name in ("norm", "condition")):
        return "a curve of other layers or facts"
    forms = {f"W.{name}": [*W.shape] for name, W in run.W.items()}
    forms |= {f"V.{name}": [len(W), rows] for name, W in run.W.items()}
    for name in (*_ROWS, *(f.name for f in fields(Batch))):
        forms[f"rows.{name}"] = [rows, *tensors.get(f"rows.{name}", torch.empty(0)).shape[1:]]
    if forms != {name: [*x.shape] for name, x in tensors.items()}:
        return "tensors of other shapes"
    fact = tensors["rows.fact"]
    return "" if fact.unique().tolist() == list(range(done)) else "rows of other facts"


def _put(run: Run, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    place = next(iter(run.W.values()))
    for p in run.projections:
        run.set_weight(p, tensors[f"W.{p.name}"].to(place))
    device = input_device(run.loaded.model)
    batch = Batch(*(tensors[f"rows.{f.name}"].to(device) for f in fields(Batch)))
    rows = {name: tensors[f"rows.{name}"].to(device) for name in _ROWS}
    run.earlier.contexts = Contexts(batch=batch, **rows)
    run.earlier.values = {p.name: tensors[f"V.{p.name}"].to(place) for p in run.projections}
    run.earlier.failures = list(record["failures"])
    run.curve = [(h["edits"], Health(h["loss"], h["norm"], h["condition"])) for h in record["curve"]]
