"""A bench run: every cell edited and measured in turn, one line of results.jsonl each; told in :func:`run_bench`.

A start reads what is there and runs the rest, so a bench can be stopped at any time and costs the running cell only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch

from mosectl._version import __version__
from mosectl.bench.config import Bench, Cell, cells
from mosectl.checkpoints.live import patched
from mosectl.editing.diagnosis import reader
from mosectl.editing.edit import EditResult, edit, made_by_the_edit
from mosectl.editing.guard import Health
from mosectl.editing.methods import method
from mosectl.editing.methods.base import seeks_compact
from mosectl.editing.options import EditOptions
from mosectl.errors import EditFailed, OutputError
from mosectl.facts.corpus import read_corpus
from mosectl.facts.groups import NEIGHBOURS, SAME_SUBJECT
from mosectl.facts.records import Fact
from mosectl.measure.answers import Interview, Kept, judge, remembered, unseen
from mosectl.measure.bootstrap import Measure, Tally, measure
from mosectl.measure.conditions import LOCALITY, counting
from mosectl.measure.groups import KNOWN, Part, answers_of, as_interviewed, parts, tallies
from mosectl.measure.perplexity import TextLoss, text_loss
from mosectl.measure.retention import LEAST, LEAST_RUN, cohorts, curve
from mosectl.model.architecture import resolve
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded, check_where, load
from mosectl.model.positions import fitted
from mosectl.model.questions import Need, Question, ask
from mosectl.patch.reader import NOT_COUNTED
from mosectl.storage.atomic import append, output_errors
from mosectl.storage.inputs import opened, parse_json
from mosectl.storage.locks import locked
from mosectl.storage.progress import OnStep
from mosectl.storage.schema import Misfit, anything, flag, integer, listed, mapping, number, optional, record, text
from mosectl.text.jsonable import jsonable

RESULTS = "results.jsonl"
TOKENS = 12  # of an answer about other facts, at most
TEXT_BOUND = 0.25  # nats a token; looser than an evaluation's: reading text shall not take longer than the edit
MAX_RESULTS = 1_000_000_000  # bytes; a cell of thousands of edits one by one may have two million
BREAKDOWNS = (EditFailed, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # a collapsed weight may not decompose
Record = dict[str, Any]  # one cell as results.jsonl has it
COMMON = record(
    {**dict.fromkeys(("key", "status", "reason"), text), **dict.fromkeys(("edits", "batch_size", "seed"), integer)},
    others=anything,
)
SCORES = ("reliability", "generalization", "locality")
_NUMBERS = mapping(optional(number))  # null was not finite
_MEASURE = optional(record({"value": optional(number)}, dict.fromkeys(("low", "high"), optional(number)), anything))
_SIDES = record({}, {"before": _MEASURE, "after": _MEASURE}, anything)
_POINT = record({"edits": integer, "norm": _NUMBERS, "condition": _NUMBERS}, {"loss": optional(number)}, anything)
_BIN = record({"first": integer, "last": integer, "after": number}, {"right_after": optional(number)}, anything)
_PART = record({"metric": text, "group": text, "own": flag, "after": _MEASURE}, others=anything)
_COHORT = record(
    {"name": text, "first": integer, "last": integer, "after": _MEASURE, "parts": listed(_PART)},
    {"right_after": _MEASURE, "kept": _MEASURE}, anything,
)  # fmt: skip
DONE = record(  # what tables and pictures use of a cell that did not fail
    {
        "scores": record({}, dict.fromkeys(SCORES, _MEASURE), anything), "harmonic": number, "seconds": mapping(number),
        "drift": _NUMBERS, "text_loss": _SIDES, "perplexity": _SIDES,
    },
    {
        "unseen": _MEASURE, "kept": _MEASURE, "groups": mapping(_MEASURE), "known": _MEASURE, "own_same_subject": _MEASURE,
        "harmonic_of_four": optional(number), "stopped": optional(text), "curve": optional(listed(_POINT)),
        "tallies": optional(record(dict.fromkeys(SCORES, listed(listed(number))), others=anything)),
        "tallies_of_four": optional(listed(listed(listed(number)))), "retention": listed(_BIN), "cohorts": listed(_COHORT),
        "not_counted": NOT_COUNTED,
    },
    anything,
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """Where a bench stands after one of its cells."""

    cell: Cell
    record: Record
    done: int  # cells of the bench, those of earlier starts with them
    total: int
    seconds: float  # this cell's
    left: float  # seconds that the rest will take, as far as one can tell


def run_bench(
    bench: Bench,
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    notice: Callable[[str], None] = lambda _: None,
    watch: Callable[[Cell], AbstractContextManager[OnStep | None]] | None = None,
    on_cell: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Record]:
    """Run every cell that ``folder`` has no result of yet; returns all results the folder then holds, by key.

    Args:
        notice: told in words what a user should know.
        watch: gives each cell a place to report its phases to.
    Raises:
        ModelError, HubError, UsageError, OutputError. A cell whose edit fails is recorded, not raised.
    """
    check_where(device, dtype)
    with locked(folder / RESULTS, folder):
        return _run(bench, folder, device, dtype, notice, watch, on_cell)


def _run(
    bench: Bench,
    folder: Path,
    device: str,
    dtype: str,
    notice: Callable[[str], None],
    watch: Callable[[Cell], AbstractContextManager[OnStep | None]] | None,
    on_cell: Callable[[Progress], None],
) -> dict[str, Record]:
    wanted = cells(bench, dtype)
    found = _mended(folder / RESULTS, notice)
    waiting = list({c.key: c for c in wanted if c.key not in found}.values())
    if done := len(wanted) - len(waiting):
        notice(f"{done} of {len(wanted)} cells are done already")
    for model in dict.fromkeys(c.model for c in waiting):  # find out before the work, not after it
        tokenizer, seen = reader(bench.model_path(model))
        for facts in dict.fromkeys((*c.edited, *c.others) for c in waiting if c.model == model):
            fitted(facts, tokenizer, seen)
    start, model, asked = time.perf_counter(), "", None
    for i, cell in enumerate(waiting, 1):
        began = time.perf_counter()
        if asked is None or cell.model != model:
            asked = None  # so that two models are never in memory together
            model, asked = cell.model, _Asked(load(bench.model_path(cell.model), device=device, dtype=dtype), bench)
        if watch is None:
            record = run_cell(cell, asked)
        else:
            with watch(cell) as on_step:
                record = run_cell(cell, asked, on_step)
        append(folder / RESULTS, _line(record))
        found[cell.key] = record
        now = time.perf_counter()
        left = (now - start) / i * (len(waiting) - i)
        on_cell(Progress(cell, record, done + i, len(wanted), now - began, left))
    return found


def records_of(wanted: Sequence[Cell], found: Mapping[str, Record]) -> list[Record]:
    """The records of cells that have one, under the labels and names that the configuration gives them now."""
    return [
        {**found[c.key], "label": c.label, "model": c.model, "dataset": c.dataset.name}
        for c in wanted
        if c.key in found
    ]


class _Asked:
    """A loaded model and what it said unedited, each question asked once."""

    def __init__(self, loaded: Loaded, bench: Bench) -> None:
        self.loaded = loaded
        self.texts = read_corpus(bench.text).texts if bench.text else ()
        self.interviews: Kept = {}
        self._kept: dict[Any, Any] = {}

    def answers(self, facts: tuple[Fact, ...]) -> list[str]:
        questions = [Question(f.prompt, TOKENS, Need.ANSWER) for f in facts]
        texts = ask(self.loaded.model, self.loaded.tokenizer, questions)
        return [answer(t) for t in texts]

    def text(self, like: TextLoss | None = None) -> TextLoss:
        return text_loss(self.loaded.model, self.loaded.tokenizer, self.texts, bound=TEXT_BOUND, like=like)

    def before(self, key: Any, ask: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = ask()
        return self._kept[key]


def run_cell(cell: Cell, asked: _Asked, on_step: OnStep | None = None) -> Record:
    """Edit, then measure with the patch on; an edit that fails is a result too."""
    start = time.perf_counter()
    record: Record = {
        "key": cell.key, "status": "done", "reason": "", "label": cell.label, "method": cell.options.method,
        "model": cell.model, "dataset": cell.dataset.name, "skip": cell.dataset.skip, "seed": cell.seed,
        "edits": cell.run.edits, "batch_size": cell.run.batch_size, "mosectl": __version__,
        "dtype": str(asked.loaded.model.dtype).removeprefix("torch."),
        "options": {**cell.options.to_record(), "corpus": Path(cell.options.corpus).name if cell.options.corpus else None},
    }  # fmt: skip
    try:
        with remembered(asked.interviews):
            options = _solved_as_edit_does(cell.options, asked.loaded)
            result = edit(cell.edited, asked.loaded, options=options, refuse=False, on_step=on_step)
        began = time.perf_counter()
        record |= _measured(cell, asked, result)
    except BREAKDOWNS as e:
        what = e.what if isinstance(e, EditFailed) else f"the linear algebra broke down: {e}".split("\n")[0]
        record |= {"status": "failed", "reason": what, "seconds": {"all": time.perf_counter() - start}}
        return jsonable(record)
    record |= {
        "stopped": result.stopped,
        "layers": [int(x) for x in result.patch.options["layers"]],
        "drift": {
            name: max(getattr(s, f"{name}_drift") for s in result.stability)
            for name in ("norm", "condition", "spectrum")
        },
        "curve": [_point(n, health) for n, health in result.curve],
    }
    seconds = {**result.seconds, "evaluate": time.perf_counter() - began, "all": time.perf_counter() - start}
    return jsonable({**record, "seconds": seconds})


def _solved_as_edit_does(options: EditOptions, loaded: Loaded) -> EditOptions:
    """The method is measured, not what is left of it when a dense form is cut down for its patch."""
    d = max(p.d for p in resolve(loaded.model).projections)
    compact = seeks_compact(method(options.method), options.form, d)
    return replace(options, form="compact" if compact else "dense")


def _measured(cell: Cell, asked: _Asked, result: EditResult) -> Record:
    """Shares, text loss and other facts, before and after; intervals are over facts or texts."""
    facts, others = cell.edited, cell.others
    count = counting(facts, result.interviews[0].conditions, LOCALITY)
    interviews = count.interview(result.interviews[0]), count.interview(result.interviews[1])
    others_before = asked.before(("others", cell.dataset.name, cell.run.edits), lambda: asked.answers(others))
    text_before = asked.before("text", asked.text)
    with (
        made_by_the_edit(),
        patched(asked.loaded.model, result.patch, force=True),
    ):  # made for this very model a moment ago
        others_after, text_after = asked.answers(others), asked.text(text_before)
    judged = judge(count.facts, *interviews)
    scores = {name: measure(found) for name, found in judged.items()}
    values = [m.value for m in scores.values() if m]
    kept = measure([Tally(float(a == b), 1.0) for a, b in zip(others_before, others_after, strict=True)])
    texts = {"before": text_before.texts, "after": text_after.texts}
    return {
        **_groups(count.facts, interviews),
        **_by_place(count.facts, interviews, result),
        **count.recorded(),
        "scores": {name: asdict(m) if m else None for name, m in scores.items()},
        "unseen": _measure(unseen(facts, result.interviews[1].rephrased, [r.wordings for r in result.facts])),
        "tallies": {name: [(t.total, t.weight) for t in ts] for name, ts in judged.items()},
        "harmonic": harmonic_mean(values),
        "kept": asdict(kept) if kept else None,
        "text_tokens": text_before.tokens,
        "text_loss": {side: _measure(t) for side, t in texts.items()},
        "perplexity": {side: _measure(t, np.exp) for side, t in texts.items()},
    }


def _groups(facts: Sequence[Fact], interviews: tuple[Interview, Interview]) -> Record:
    """Shares of groups of prompts and of wordings known before, compared as QA does, and the mean of four.

    The four: reliability, generalization over known wordings, neighbours, same-subject; null where one was not asked. Where
    a data set names no groups, its locality prompts are the neighbours and same-subject prompts are mosectl's own.
    """
    before, after = map(answers_of, interviews)
    facts = as_interviewed(facts)

    def of(part: Part) -> tuple[Sequence[Tally], Measure | None]:
        found = tallies("qa", part, facts, after, before)[0]
        return found, measure(found)

    asked = {(p.group, p.own): of(p) for p in parts(facts, before) if p.metric == "locality"}
    groups = {group: found for (group, own), found in asked.items() if not own}
    known, own, nothing = of(Part("generalization", KNOWN)), asked.get((SAME_SUBJECT, True)), ((), None)
    neighbours = groups.get(NEIGHBOURS, nothing) if groups else of(Part("locality", ""))
    four = [of(Part("reliability", "")), known, neighbours, groups.get(SAME_SUBJECT) or own or nothing]
    values = [m.value for _, m in four if m]
    whole = len(values) == len(four)
    return {
        "groups": {name: asdict(m) for name, (_, m) in groups.items() if m},
        "known": asdict(m) if (m := known[1]) else None,
        "own_same_subject": asdict(m) if own and (m := own[1]) else None,
        "harmonic_of_four": harmonic_mean(values) if whole else None,
        "tallies_of_four": [[(t.total, t.weight) for t in found] for found, _ in four] if whole else None,
    }


def _by_place(facts: Sequence[Fact], interviews: tuple[Interview, Interview], result: EditResult) -> Record:
    """What is left by a fact's place in the run, of those not taken back; nothing of a run that is small or one batch."""
    edited = [r for r in result.facts if r.status != "not edited"]
    then = [r.held_right_after for r in edited]
    if len(edited) < LEAST_RUN or all(t is None for t in then):
        return {"retention": [], "cohorts": []}
    before, after = (answers_of(i)[: len(edited)] for i in interviews)
    holds = [says(a.said, *r.fact.targets) for a, r in zip(after, edited, strict=True)]
    asked = as_interviewed(facts[: len(edited)]), [r.right_after for r in edited], after, before
    return {
        "retention": [*map(asdict, curve(holds, then, len(facts), LEAST))],
        "cohorts": [*map(asdict, cohorts(*asked))],
    }


def _measure(units: Sequence[Tally], transform: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Record | None:
    found = measure(units, transform)
    return asdict(found) if found else None


def _point(edits: int, health: Health) -> Record:
    """One point of a curve: how the model was after so many edits."""
    return {"edits": edits, "loss": health.loss, "norm": dict(health.norm), "condition": dict(health.condition)}


# The results file.


def read_results(path: Path) -> tuple[dict[str, Record], dict[int, str]]:
    """Records by key (the last one counts), and what is wrong with each line that cannot be used, by its number.

    Raises:
        OutputError: the file cannot be read.
    """
    found: dict[str, Record] = {}
    bad: dict[int, str] = {}
    if not os.path.lexists(path):
        return found, bad
    with opened(path, OutputError, "move it away, or choose another -o", MAX_RESULTS) as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    cell = parse_json(line)
                    _check(cell)
                    found[cell["key"]] = cell
            except ValueError as e:
                bad[number] = str(e)
    return found, bad


def _check(found: Any) -> None:
    """Raises Misfit where a cell's record is not as tables and pictures need it."""
    COMMON(found)
    if found["status"] != "done":
        return
    DONE(found)
    kept = {f"tallies.{name}": found["tallies"][name] for name in SCORES} if found.get("tallies") else {}
    kept |= {f"tallies_of_four.{i}": pairs for i, pairs in enumerate(found.get("tallies_of_four") or ())}
    for name, pairs in kept.items():
        if len(pairs) != found["edits"] or {*map(len, pairs)} != {2}:
            raise Misfit("is not a pair a fact", name)


def unusable(path: Path, bad: Mapping[int, str]) -> list[str]:
    """Lines to tell a user about lines of the results file that are left out."""
    out = [f"{path}:{number}: {what}: left out, the cell counts as not run" for number, what in list(bad.items())[:5]]
    return out + ([f"{path}: {len(bad) - 5} more lines are left out"] if len(bad) > 5 else [])


def _mended(path: Path, notice: Callable[[str], None]) -> dict[str, Record]:
    """What is done already; a last line that was cut off is dropped, in the file too, other damaged ones stay there."""
    found, bad = read_results(path)
    for line in unusable(path, bad):
        notice(line)
    if not path.exists() or not (data := path.read_bytes()) or data.endswith(b"\n"):
        return found
    with output_errors(path):
        if data.count(b"\n") + 1 in bad:
            os.truncate(path, data.rfind(b"\n") + 1)
        else:
            with path.open("ab") as file:
                file.write(b"\n")
    return found


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
