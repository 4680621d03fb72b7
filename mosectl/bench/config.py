"""The configuration of a bench: a YAML file, checked key by key, and the cells it asks for.

A cell is one edit run: one model, dataset, number of edits, batch size, seed and method. Its key is a hash of everything
that determines its numbers, so that a later start knows what is done already.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mosectl._version import __version__
from mosectl.editing.options import EditOptions, options_from, trained_editor
from mosectl.errors import MosectlError, UsageError
from mosectl.facts.choices import choices
from mosectl.facts.corpus import read_corpus
from mosectl.facts.records import Fact, read_facts
from mosectl.facts.shapes import Chosen
from mosectl.storage.data_sets import data_set_of, is_data_set, origin
from mosectl.storage.hub import SCHEME
from mosectl.storage.safe_yaml import read_yaml

ENTRIES = 1000  # of a list, at most
CELLS = 100_000
OTHERS = 200  # facts after the edited ones that are asked before and after


@dataclass(frozen=True)
class Dataset:
    """A facts file, or a data set on the Hub; the first ``skip`` facts are left out, being those that settings were tuned
    on.
    """

    name: str
    path: str | Path
    facts: tuple[Fact, ...]  # after those skipped
    skip: int
    sha256: str  # of the file; of a data set: of its address at its commit
    read: Chosen  # what the file calls fields, where the configuration says so
    limit: int | None  # entries that are read


@dataclass(frozen=True)
class RunKind:
    """How many facts, and how many of them together; a batch size of 1 is single-sequential, 0 one batch."""

    edits: int
    batch_size: int

    def __str__(self) -> str:
        if self.batch_size in (0, self.edits):
            return f"{self.edits} edits in one batch"
        return f"{self.edits} edits, " + ("one by one" if self.batch_size == 1 else f"{self.batch_size} at a time")


@dataclass(frozen=True)
class BenchMethod:
    """A method with its settings, under the name that the tables give it."""

    label: str
    options: EditOptions
    editor: str | None  # id of the trained editor


@dataclass(frozen=True)
class Bench:
    """A checked configuration."""

    name: str  # the file's
    models: tuple[str, ...]  # as written
    folder: Path  # the configuration's own
    datasets: tuple[Dataset, ...]
    corpus_sha256: str
    text: str | None
    text_sha256: str
    runs: tuple[RunKind, ...]
    seeds: tuple[int, ...]
    methods: tuple[BenchMethod, ...]
    notes: tuple[str, ...]  # what a reader of the tables must know

    def model_path(self, model: str) -> str:
        """A folder or file beside the configuration, else as written: one seen from here, or a hub id."""
        beside = self.folder / model
        return str(beside) if beside.exists() else model


@dataclass(frozen=True)
class Cell:
    """One edit run of a bench."""

    key: str
    model: str
    dataset: Dataset
    run: RunKind
    seed: int
    label: str
    options: EditOptions

    @property
    def edited(self) -> tuple[Fact, ...]:
        """The facts that are edited."""
        return self.dataset.facts[: self.run.edits]

    @property
    def others(self) -> tuple[Fact, ...]:
        """Facts of the same file that are not edited."""
        return self.dataset.facts[self.run.edits : self.run.edits + OTHERS]

    def __str__(self) -> str:
        return f"{self.label} · {self.model} · {self.dataset.name} · {self.run} · seed {self.seed}"


def cells(bench: Bench, dtype: str = "auto") -> list[Cell]:
    """Every cell, those of one model together: it is loaded once."""
    out = []
    for model in bench.models:
        for dataset in bench.datasets:
            for run in bench.runs:
                for seed in bench.seeds:
                    for m in bench.methods:
                        options = replace(m.options, batch_size=run.batch_size, seed=seed)
                        out.append(
                            Cell(
                                _key(bench, model, dataset, run, options, m.editor, dtype),
                                model,
                                dataset,
                                run,
                                seed,
                                m.label,
                                options,
                            )
                        )
    return out


def _key(
    bench: Bench, model: str, dataset: Dataset, run: RunKind, options: EditOptions, editor: str | None, dtype: str
) -> str:
    """16 hex digits; names and places of files do not count, what they hold does."""
    what = {
        "mosectl": __version__, "model": model, "dtype": dtype, "facts": dataset.sha256, "skip": dataset.skip,
        "run": asdict(run), "options": {**options.to_record(), "corpus": bench.corpus_sha256, "editor": editor},
        "text": bench.text_sha256, **({"read": dataset.read} if dataset.read else {}),
        **({"limit": dataset.limit} if dataset.limit else {}),
        # Results from before conditions were asked are others.
        **({"conditions": True} if any(p.needs for f in dataset.facts for p in f.locality) else {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


# Reading.


def read_bench(path: str | Path, on_error: str = "fail") -> Bench:
    """Read and check a configuration and the facts and texts it names; models are not looked for yet.

    Raises:
        UsageError: not a configuration; an unknown key, method or setting. FactsError: a facts file is wrong.
    """
    path = Path(path)
    top = _Table(
        read_yaml(path, UsageError, "see examples/bench-small.yaml"),
        str(path),
        required=("models", "datasets", "runs", "methods"),
        optional=("corpus", "text", "seeds", "layers"),
    )
    corpus, text = (_beside(path, top.get(name, str, None)) for name in ("corpus", "text"))
    statistics, held_out = _read_text(corpus, top, "corpus"), _read_text(text, top, "text") if text else None
    runs = tuple(_run(t) for t in top.tables("runs", required=("edits",), optional=("batch_size",)))
    tables = top.tables("datasets", required=("facts",), optional=("name", "skip", "read", "limit"))
    datasets = tuple(_dataset(t, path, on_error, runs) for t in tables)
    methods = tuple(
        _method(t, path, top, corpus)
        for t in top.tables("methods", required=("name",), optional=("set", "rounds", "layers", "label", "editor"))
    )
    models, seeds = tuple(top.items("models", str)), tuple(top.items("seeds", int, [0]))
    named = {"models": models, "seeds": seeds, "runs": list(map(str, runs)), "datasets": [d.name for d in datasets]}
    for key, names in {**named, "methods": [m.label for m in methods]}.items():
        if twice := [str(n) for i, n in enumerate(names) if n in names[:i]]:
            fix = "give each its own label" if key == "methods" else "remove one, or give each its own name"
            raise top.bad(f"'{twice[0]}' stands twice", fix, key)
    if (n := math.prod(map(len, (models, datasets, runs, seeds, methods)))) > CELLS:
        raise top.bad(f"asks for {n:,} cells", f"ask for {CELLS:,} at most: split it into several")
    same = held_out is not None and held_out == statistics
    notes = ("the text for the text loss also served as statistics: it is not held out",) if same else ()
    return Bench(
        path.name, models, path.parent, datasets, statistics, text, held_out or "", runs, seeds, methods, notes
    )


class _Table:
    """One mapping of the file; messages name the file and the key."""

    def __init__(self, value: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        self.where, known = where, (*required, *optional)
        if not isinstance(value, Mapping):
            raise self.bad("is not a mapping of keys to values", f"its keys are: {', '.join(known)}")
        if unknown := [k for k in value if k not in known]:
            raise self.bad(f"unknown key '{unknown[0]}'", f"the keys here are: {', '.join(known)}")
        if missing := [k for k in required if value.get(k) is None]:
            raise self.bad(f"'{missing[0]}' is missing", f"add it; the keys here are: {', '.join(known)}")
        self.values = value

    def bad(self, what: str, fix: str, key: str = "") -> UsageError:
        return UsageError(what, where=f"{self.where}: {key}" if key else self.where, fix=fix)

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else self.checked(value, kind, key)

    def checked(self, value: Any, kind: type, key: str) -> Any:
        wrong = not isinstance(value, kind) or isinstance(value, bool) or value == ""
        if wrong or (isinstance(value, int) and not 0 <= value < 2**63):
            name = {int: "a whole number, 0 or more", str: "a text"}[kind]
            shown = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)[:60]
            raise self.bad(f"{shown} is not {name}", f"write {name}", key)
        return value

    def items(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """A list of numbers or texts; one alone counts as a list of one."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        values = value if isinstance(value, list) else [value]
        if not 0 < len(values) <= ENTRIES:
            raise self.bad("is empty" if not values else f"holds {len(values)}", f"give 1 to {ENTRIES}", key)
        return [self.checked(v, kind, f"{key}[{i}]") for i, v in enumerate(values)]

    def tables(self, key: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> list[_Table]:
        value = self.values[key]
        if not isinstance(value, list) or not 0 < len(value) <= ENTRIES:
            what = "is not a list" if not isinstance(value, list) or not value else f"holds {len(value)} entries"
            raise self.bad(what, f"write a list of 1 to {ENTRIES} entries with: {', '.join(required)}", key)
        return [
            _Table(v, f"{self.where}: {key}[{i}]", required=required, optional=optional) for i, v in enumerate(value)
        ]


def _beside(path: Path, name: str | None) -> str | None:
    return None if name is None else str(path.parent / name)


def _read_text(name: str | None, top: _Table, key: str) -> str:
    """The sha256 of a text file."""
    try:
        return read_corpus(name).sha256
    except UsageError as e:
        raise top.bad(f"{e.where}: {e.what}", e.fix, key) from e


def _run(table: _Table) -> RunKind:
    edits, size = table.get("edits", int, 0), table.get("batch_size", int, 0)
    if edits < 1:
        raise table.bad("0 is too few", "edit at least one fact", "edits")
    return RunKind(edits, 0 if size >= edits else size)


def _dataset(table: _Table, path: Path, on_error: str, runs: tuple[RunKind, ...]) -> Dataset:
    given = table.get("facts", str, "")
    file = given if is_data_set(given) else path.parent / given
    name, skip, limit = table.get("name", str, _name(given)), table.get("skip", int, 0), table.get("limit", int, None)
    try:
        read = choices(table.items("read", str, []), "read:")
    except UsageError as e:
        raise table.bad(e.what, e.fix, "read") from e
    if limit == 0:
        raise table.bad("0 is too few", "read at least one entry", "limit")
    facts = read_facts(file, on_error, limit, read).facts
    needed = max(r.edits for r in runs)
    if len(facts) < skip + needed:
        what = f"{file} holds {len(facts)} usable facts; {skip} are skipped and a run edits {needed}"
        raise table.bad(what, "give more facts, a smaller skip or fewer edits")
    origins = "\n".join(dict.fromkeys(origin(fact.source) for fact in facts))
    content = file.read_bytes() if isinstance(file, Path) else origins.encode()
    return Dataset(name, file, facts[skip:], skip, hashlib.sha256(content).hexdigest(), read, limit)


def _name(facts: str) -> str:
    """What a dataset is called where the configuration does not say."""
    if not is_data_set(facts):
        return Path(facts).stem
    place = data_set_of(facts)
    return Path(place.file).stem or place.repo.rpartition("/")[2]


def _method(table: _Table, path: Path, top: _Table, corpus: str | None) -> BenchMethod:
    """The guard is off, so that a collapse is seen; ``set: [guard=1]`` switches it on."""
    name, settings = table.get("name", str, ""), table.items("set", str, [])
    editor = table.get("editor", str, None)
    if editor and not editor.startswith(SCHEME):
        editor = str(path.parent / editor)
    rounds = table.get("rounds", int, None)
    layers = "auto" if editor else _layers(table) or _layers(top) or "auto"
    try:
        options = options_from(
            ["guard=0", *settings], method=name, rounds=rounds, layers=layers, corpus=corpus, editor=editor
        )
    except MosectlError as e:
        raise table.bad(e.what, e.fix, "set" if e.what.startswith("--set") else "name") from e
    try:
        trained = trained_editor(options)
    except MosectlError as e:
        raise table.bad(f"{e.where}: {e.what}" if e.where else e.what, e.fix, "editor") from e
    if rounds == 0:
        raise table.bad("0 is too few", "give at least one round", "rounds")
    given = ", ".join([*settings, *([f"rounds={rounds}"] if rounds else [])])
    return BenchMethod(
        table.get("label", str, f"{name} ({given})" if given else name), options, trained.id if trained else None
    )


def _layers(table: _Table) -> str | None:
    """Layers as the command line has them; a YAML list or a single number is understood too."""
    value = table.values.get("layers")
    if isinstance(value, int | list):
        return ",".join(map(str, table.items("layers", int)))
    return table.get("layers", str, None)
