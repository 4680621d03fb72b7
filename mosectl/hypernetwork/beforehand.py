"""How to train an editor, and what a training can be refused for before the model's weights are loaded."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, ModelError, Notice, OutputError, UsageError
from mosectl.facts.corpus import Corpus
from mosectl.facts.records import Fact
from mosectl.hypernetwork.network import METHODS
from mosectl.model import distributed
from mosectl.model.architecture import parse_layers, resolve
from mosectl.model.edit_site import Projection
from mosectl.model.positions import fitted, window
from mosectl.storage import schema
from mosectl.storage.state_file import digest, read_record

STATE = "training"
NUMBERS = ("step", "validation", "edit", "generalization", "locality", "reached")  # of each validation
HISTORY = schema.record(dict.fromkeys(NUMBERS, schema.number), others=schema.number)
RECORD = schema.record(
    {
        "step": schema.integer, "waited": schema.integer, "belongs": schema.mapping(schema.text),
        "history": schema.listed(HISTORY),
    },
    others=schema.anything,
)  # fmt: skip
AGAIN = "give --overwrite to start again"


@dataclass(frozen=True)
class TrainOptions:
    """How to train an editor."""

    method: str = "horse"
    layers: str = "auto"  # "auto": the last six, at most half of them
    rank: int = 128
    blocks: int = 2
    batch_size: int = 64  # facts edited together in a step: as many as will be, if memory and time allow
    steps: int = 300  # at most
    rate: float = 1e-2  # Adam's
    clip: float = 1.0  # of the gradient's norm
    locality: float = 5.0  # weight of the divergence from the unedited model
    held_out: float = 0.1  # share of the facts that is kept for validation, when there is no file for it
    every: int = 20  # steps between validations
    patience: int = 6  # validations without a better one before training stops
    seed: int = 0


def check(options: TrainOptions, facts: Sequence[Fact], validation: Sequence[Fact]) -> None:
    """What can be told before a model is loaded.

    Raises:
        UsageError: no such method, a rate that is not positive. FactsError: too few, or some are validated on too.
    """
    if options.method not in METHODS:
        what = f"--method {options.method}: there is nothing to train for it"
        raise UsageError(what, fix=f"choose one of: {', '.join(METHODS)}")
    if not 0 < options.rate < math.inf:
        raise UsageError(f"--rate {options.rate:g}: nothing would be learnt", fix="give a number above 0, e.g. 0.01")
    if len(facts) < 3:
        raise FactsError(
            f"too few facts to train on: {len(facts)}", fix="give hundreds: an editor learns from many edits"
        )
    if both := {f.prompt for f in facts} & {f.prompt for f in validation}:
        what = f"{len(both)} validation facts are trained on as well, such as '{min(both)}'"
        raise FactsError(what, fix="give others, or leave --validation out: a tenth of the facts is kept for it then")


def check_model(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    options: TrainOptions,
    corpus: Corpus,
    *,
    validation: Sequence[Fact] = (),
    on_error: str = "fail",
    state: Path | None = None,
    resume: bool = False,
) -> None:
    """What can be told once a model's config and tokenizer are known, before its weights are loaded.

    Args:
        as of :func:`train`.
    Raises:
        UsageError, FactsError, ModelError. OutputError: the interrupted training was another one.
    """
    with warnings.catch_warnings():  # the training itself tells what is only long
        warnings.simplefilter("ignore", Notice)
        _, known, unseen = prepared(model, tokenizer, facts, validation, options, on_error)
    if resume and state and state.exists():
        check_belongs(belongs(known, unseen, options, corpus), state)


def prepared(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    validation: Sequence[Fact],
    options: TrainOptions,
    on_error: str,
) -> tuple[list[Projection], Sequence[Fact], Sequence[Fact]]:
    """What a training works on: the edit sites, and the facts to train and to validate on that ``model`` can read.

    Raises:
        UsageError, FactsError, ModelError.
    """
    seen = window(model)
    known, unseen = (fitted(part, tokenizer, seen, on_error=on_error) for part in (facts, validation))
    check(options, known, unseen)
    return edited_projections(model, options), *with_validation(known, unseen, options)


def belongs(facts: Sequence[Fact], validation: Sequence[Fact], options: TrainOptions, corpus: Corpus) -> dict[str, str]:
    """What a training's state belongs to as far as that is known without weights: hashes, by name."""
    how = {k: v for k, v in asdict(options).items() if k not in ("steps", "patience")}  # these may be raised
    return {
        "facts": digest([f.fields() for f in (*facts, *validation)]),
        "options": digest(how),
        "corpus": digest(corpus.sha256),
        "number of processes": digest(distributed.world()),
    }


def check_belongs(ours: Mapping[str, str], state: Path, record: Mapping[str, Any] | None = None) -> None:
    """Raises OutputError: the state there is one of another training."""
    theirs = (record or read_record(state, STATE, RECORD, AGAIN))["belongs"]
    if other := [name for name in ours if ours[name] != theirs.get(name)]:
        what = f"the interrupted training was one with other {' and '.join(other)}"
        raise OutputError(what, where=str(state), fix=f"run it as then, or {AGAIN}")


def edited_projections(model: Any, options: TrainOptions) -> list[Projection]:
    """The edit sites of the layers that are asked for. Raises UsageError, ModelError: an editor cannot be for these."""
    every = resolve(model).projections
    n = len(every)
    layers = parse_layers(options.layers, n) or range(n - max(1, min(6, n // 2)), n)
    projections = [p for p in every if p.layer in layers]
    if mixed := next((p for p in projections if not p.single_matrix), None):
        fix = "use --method isospectral, which edits mixtures"
        raise ModelError("an editor is for layers with one FFN, not for mixtures", where=mixed.name, fix=fix)
    if len({(p.p, p.d) for p in projections}) > 1:
        raise ModelError("these layers differ in size", fix="name layers of one size with --layers")
    return projections


def with_validation(
    facts: Sequence[Fact], validation: Sequence[Fact], options: TrainOptions
) -> tuple[Sequence[Fact], Sequence[Fact]]:
    """The facts to train on, and those to validate on: a share of the former where none are given."""
    if not validation:
        mixed = random.Random(options.seed).sample(list(facts), len(facts))
        n = max(1, round(options.held_out * len(mixed)))
        facts, validation = mixed[n:], mixed[:n]
    return facts, validation
