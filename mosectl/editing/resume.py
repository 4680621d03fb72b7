"""A run between two batches, on disk: an interrupted edit goes on from there to the very same patch.

One safetensors file beside the patch holds what a batch leaves behind: the weights so far in float64, and the earlier facts'
rows, keys and values. Its record says what it belongs to: it is never continued with other facts, settings or weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosectl._version import __version__
from mosectl.editing.contexts import BY_ROW, Contexts
from mosectl.editing.guard import Health
from mosectl.editing.options import EditOptions
from mosectl.editing.previous_edits import Kept
from mosectl.editing.turns import SIDES
from mosectl.errors import OutputError
from mosectl.facts.records import Fact
from mosectl.model.forward import Batch
from mosectl.storage import schema
from mosectl.storage.state_file import damaged, digest, read_record, read_state, write_state

KIND = "progress"
_EACH = schema.mapping(schema.number)  # by module path
_POINT = {"edits": schema.integer, "loss": schema.number, "norm": _EACH, "condition": _EACH}
RECORD = schema.record(
    {
        "belongs": schema.mapping(schema.text), "losses": schema.listed(schema.number),
        "right_after": schema.listed(schema.text),
        "failures": schema.listed(schema.integer), "leads": schema.listed(schema.number),
        "summed": schema.integer, "turn": schema.integer,
        "curve": schema.listed(schema.record(_POINT, others=schema.anything)),
    },
    others=schema.anything,
)  # fmt: skip
ROWS, WIDTH = 1000, 16_384  # of a fact, at most: its rows, and a row's bytes but for what is written there
_START = "give --overwrite to start again"
_AGAIN = "finish it with what it was begun with, or give --overwrite to start again"


def belongs(facts: Sequence[Fact], options: EditOptions, layers: Sequence[int] | None) -> dict[str, str]:
    """What a state belongs to as far as that is known without weights: hashes, by name.

    Args:
        options: settled. layers: that are edited; None: not known yet.
    """
    asked = [{k: v for k, v in f.fields().items() if k != "source"} for f in facts]
    known = {"facts": digest(asked), "settings": digest(options.to_record())}
    known |= {} if layers is None else {"layers": digest(sorted(layers))}
    return known | {"version of mosectl": __version__}


def beside(out: Path) -> Path:
    """Where the state of a run that will write the patch ``out`` is kept."""
    return out.with_name(f"{out.name}.progress")


@dataclass(frozen=True)
class State:
    """What a session is after a batch: it says it, and takes it back."""

    W: Mapping[str, Tensor]  # (d, p) float64, the weights so far by module path
    turns: Mapping[str, Mapping[str, Tensor]]  # the rotations that lead to W, by module path, where a session has them
    earlier: Kept  # the facts edited so far
    curve: Sequence[tuple[int, Health]]  # facts edited so far, and health then
    losses: Sequence[float]  # of each fact right after its batch, nats a token
    right_after: Sequence[str]  # the model's answer to each fact right after its batch
    carried: Mapping[str, Tensor] = field(default_factory=dict)  # what the method carries from batch to batch


@dataclass(frozen=True)
class Progress:
    """Where a session's state is kept, and whether one that is there is continued."""

    path: Path
    resume: bool = False

    def check(self, ours: Mapping[str, str]) -> None:
        """See from its record alone whether the kept state belongs to ``ours``, where it is to be continued.

        Raises:
            OutputError: it belongs to something else, or is no such state.
        """
        if self.resume and os.path.lexists(self.path):
            self._check(ours, read_record(self.path, KIND, RECORD, _START))

    def _check(self, ours: Mapping[str, str], record: Mapping[str, Any]) -> None:
        if other := [name for name in ours if ours[name] != record["belongs"].get(name)]:
            what = f"the interrupted run was one with other {' and '.join(other)}"
            raise OutputError(what, where=str(self.path), fix=_AGAIN)

    def load(
        self,
        ours: Mapping[str, str],
        shapes: Mapping[str, tuple[int, int]],
        facts: int,
        carried: Mapping[str, tuple[int, ...]] | None = None,
    ) -> State | None:
        """The kept state of a session of so many facts that has not begun; None if there is none, or it is not asked for.

        Args:
            ours: what the state has to belong to: hashes, by name.
            shapes: (d, p) of each edited weight, by module path.
            carried: shapes of what the method carries from batch to batch, by name.
        Raises:
            OutputError: the state is of other facts, settings or weights, or damaged.
        """
        if not self.resume or not os.path.lexists(self.path):
            return None
        a_fact = ROWS * (8 * sum(d + p for d, p in shapes.values()) + WIDTH)
        limit = 8 * sum(2 * d * p + 2 * d * d + 3 * p * p for d, p in shapes.values()) + facts * a_fact + 10**7
        record, tensors = read_state(self.path, KIND, RECORD, _START, limit)
        self._check(ours, record)
        carried = carried or {}
        if what := _misfit(shapes, carried, tensors, record, facts):
            raise damaged(self.path, what, _START)
        rows: dict[str, Any] = {name: tensors[f"rows.{name}"] for name in BY_ROW}
        return State(
            {name: tensors[f"W.{name}"] for name in shapes},
            {name: _turns(tensors, name) for name in shapes},
            Kept(
                Contexts(batch=Batch(*(tensors[f"rows.{f.name}"] for f in fields(Batch))), **rows),
                tensors["column"],
                {name: tensors[f"K.{name}"] for name in shapes},
                {name: tensors[f"V.{name}"] for name in shapes},
                {name: (tensors[f"P.{name}"], tensors[f"Q.{name}"]) for name in shapes if record["summed"]},
                list(record["failures"]),
                [float(x) for x in record["leads"]],
                record["summed"],
                record["turn"],
            ),
            [(h["edits"], Health(h["loss"], h["norm"], h["condition"])) for h in record["curve"]],
            [float(x) for x in record["losses"]],
            list(record["right_after"]),
            {name: tensors[f"carried.{name}"] for name in carried},
        )

    def save(self, ours: Mapping[str, str], state: State) -> None:
        """Keep a session's state in place of the one before, atomically."""
        earlier = state.earlier
        rows = {name: getattr(earlier.contexts, name) for name in BY_ROW}
        rows |= {f.name: getattr(earlier.contexts.batch, f.name) for f in fields(Batch)}
        tensors = {
            **{f"W.{name}": W for name, W in state.W.items()},
            "column": earlier.column,
            **{f"K.{name}": K for name, K in earlier.keys.items()},
            **{f"V.{name}": V for name, V in earlier.values.items()},
            **{
                f"{letter}.{name}": x
                for name, pair in earlier.sums.items()
                for letter, x in zip("PQ", pair, strict=True)
            },
            **{f"carried.{name}": x for name, x in state.carried.items()},
            **{f"turns.{name}.{part}": x for name, parts in state.turns.items() for part, x in parts.items()},
            **{f"rows.{name}": x for name, x in rows.items()},
        }
        record = {
            "belongs": dict(ours),
            "losses": list(state.losses),
            "right_after": list(state.right_after),
            "failures": list(earlier.failures),
            "leads": list(earlier.leads),
            "summed": earlier.summed,
            "turn": earlier.turn,
            "curve": [{"edits": n, **asdict(health)} for n, health in state.curve],
        }
        write_state(self.path, KIND, record, tensors)

    def done(self) -> None:
        """The patch is written: nothing is left to continue."""
        self.path.unlink(missing_ok=True)


def _turns(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One layer's rotations, by names that turns.from_tensors knows."""
    start = f"turns.{name}."
    return {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}


def _misfit(
    shapes: Mapping[str, tuple[int, int]],
    carried: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    facts: int,
) -> str:
    """What in a state that is meant for this session does not go with it; empty if nothing."""
    done, layers = len(record["losses"]), set(shapes)
    rows, columns = (tensors.get(name, torch.empty(0)).numel() for name in ("rows.fact", "column"))
    if not 0 < done <= facts or {len(record[name]) for name in ("failures", "leads", "right_after")} != {done}:
        return f"{done} losses of {facts} facts"
    points = [h["edits"] for h in record["curve"]]
    if points[-1:] != [done] or any({*h[name]} != layers for h in record["curve"] for name in ("norm", "condition")):
        return "a curve of other layers or facts"
    forms = {f"W.{name}": [d, p] for name, (d, p) in shapes.items()} | {"column": [columns]}
    if not 0 <= record["summed"] <= done:
        return "sums over other facts"
    for name, (d, p) in shapes.items():
        forms |= {f"K.{name}": [p, columns], f"V.{name}": [d, columns]}
        forms |= {f"P.{name}": [p, p], f"Q.{name}": [d, p]} if record["summed"] else {}
    forms |= {f"carried.{name}": [*shape] for name, shape in carried.items()}
    for name in (*BY_ROW, *(f.name for f in fields(Batch))):
        forms[f"rows.{name}"] = [rows, *tensors.get(f"rows.{name}", torch.empty(0)).shape[1:]]
    found = {name: [*x.shape] for name, x in tensors.items()}
    for name, widths in shapes.items():
        for side, n in zip(SIDES, widths, strict=True):
            at = f"turns.{name}.{side}"
            r = (found.get(f"{at}.U") or [n, n])[-1]
            ways = {f"{at}.R": [n, n]}, {f"{at}.U": [n, r], f"{at}.Q": [r, r]}
            forms |= next((way for way in ways if way.keys() <= found.keys()), {})
    if forms != found:
        return "tensors of other shapes"
    fact = tensors["rows.fact"]
    known = fact.unique().tolist() == list(range(done)) and bool(torch.isin(tensors["column"], fact).all())
    return "" if known else "rows of other facts"
