"""An edit evaluated: every fact asked before and after, judged under each protocol, with intervals; told in
:func:`evaluate_edit`.

"Right after" is what the patches recorded when each fact's batch was done, "after" what the model says now, with every
edit in it: the difference is what later edits (or rounding, or another dtype) have cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mosectl._version import __version__
from mosectl.errors import UsageError
from mosectl.facts.corpus import Corpus, read_corpus
from mosectl.facts.probe import NotCounted, Probe
from mosectl.facts.records import Fact, as_facts
from mosectl.measure.answers import talk
from mosectl.measure.before_after import How, Subject, both_sides
from mosectl.measure.bootstrap import RESAMPLES, SEED, Measure, Tally, measure
from mosectl.measure.conditions import BOTH, conditions, counting
from mosectl.measure.groups import answers_of, counted_by, unedited_neighbours
from mosectl.measure.lm_harness import Ability, AbilityTasks, Side, ability_notes, ask_tasks, compare_abilities
from mosectl.measure.metrics import Judged, Metric, Sides, held, metrics
from mosectl.measure.next_tokens import NextToken, NextTokens, compare_next
from mosectl.measure.notes import condition_notes, notes_of, own_notes
from mosectl.measure.own_probes import own_probes
from mosectl.measure.perplexity import BOUND, TextLoss, ngram_entropy, text_loss
from mosectl.measure.probes import ProbeAnswer, probe_answers
from mosectl.measure.protocols import METRICS, PROTOCOLS, Answers, portable_probes
from mosectl.measure.retention import Bin, Cohort, cohorts, curve
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded
from mosectl.model.positions import fitted, window
from mosectl.model.questions import MAX_NEW_TOKENS
from mosectl.model.scoring import encode_pairs, paired, score
from mosectl.patch.record import PatchFact
from mosectl.storage.progress import OnStep
from mosectl.text import notebook
from mosectl.text.jsonable import UNSAID
from mosectl.text.table import csv_bytes

BATCH = 64  # prompts of the ability tasks asked together
T = TypeVar("T")


@dataclass(frozen=True)
class TextMetric:
    """A number about text rather than facts."""

    name: str  # "fluency" or "perplexity"
    about: str
    before: Measure | None
    after: Measure | None


@dataclass(frozen=True)
class EvaluatedFact:
    """One fact: what was answered, and its share under each protocol."""

    prompt: str
    subject: str
    target_new: str
    before: str | None
    right_after: str | None
    after: str
    probability_before: float | None  # of target_new
    probability_after: float
    holds: bool
    held_right_after: bool | None
    shares: dict[str, float | None]  # "protocol.metric", after the edit


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; ``notes`` say what a reader must know to read the numbers right."""

    subject: Subject
    metrics: tuple[Metric, ...] = field(repr=False)
    texts: tuple[TextMetric, ...]
    abilities: tuple[Ability, ...]  # empty where none were asked for
    retention: tuple[Bin, ...]  # of the facts in file order; what a patch has recorded is right after
    facts: tuple[EvaluatedFact, ...] = field(repr=False)
    notes: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    next_tokens: tuple[NextToken, ...] = ()  # how far what comes next moved; empty without a model from before
    # Every rephrasing, locality and portability prompt that counts.
    probes: tuple[ProbeAnswer, ...] = field(default=(), repr=False)
    # The oldest, middle and newest facts in the order in which the patches hold them; empty for few, or one batch.
    cohorts: tuple[Cohort, ...] = ()
    # Prompts whose conditions the model did not meet before the edit.
    not_counted: tuple[NotCounted, ...] = field(default=(), metadata=UNSAID)

    def _repr_html_(self) -> str:
        return notebook.shown(self)

    def metric(self, protocol: str, name: str, group: str = "") -> Metric | None:
        """One of the metrics, None where it was not asked for; of all prompts, or of a group."""
        wanted = (protocol, name, group)
        return next((m for m in self.metrics if (m.protocol, m.name, m.group) == wanted), None)


@dataclass(frozen=True)
class Observation:
    """All that one model was asked."""

    facts: tuple[Answers, ...]
    probabilities: tuple[float, ...]  # of target_new
    entropy: tuple[float, ...]  # a fact, bits
    text: TextLoss
    dtype: str
    abilities: Side | None = None
    next: NextTokens | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)  # by prompt, what was said to conditions of probes


def evaluate_edit(
    what: Any,
    facts: str | Path | Sequence[Fact | Mapping[str, Any]],
    *,
    model: Any = None,
    base: Any = None,
    text: str | Path | None = None,
    text_bound: float | None = BOUND,
    protocols: Sequence[str] = (),
    abilities: AbilityTasks | None = None,
    chat: bool = False,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    force: bool = False,
    on_error: str = "fail",
    on_step: OnStep | None = None,
) -> Evaluation:
    """Measure what an edit reached, what it cost, and what is left of it.

    Args:
        what: a patch or its file; or an edited (or plain) model: folder, hub id, or Loaded.
        model: for a patch: the model it is for; default: the one it names.
        base: for an edited model: the unedited one; default: found by its journal.
        text: held-out text for perplexity (.txt or .jsonl); default: the embedded corpus.
        text_bound: it is read until half the 95 % interval of its mean loss is no wider, nats a token; None: all of it.
        protocols: names from :data:`mosectl.measure.protocols.PROTOCOLS`; default: all.
        abilities: tasks of lm-evaluation-harness, from :func:`mosectl.measure.lm_harness.load_tasks`.
        batch_size: prompts asked together; default: as many as fit.
        force: skip the check that patch or base belong to the model.
        on_error: facts and probes that are longer than the model can read: "fail", or "skip" them.
        on_step: called with (phase, done, total) as the work goes on.
    Raises:
        FactsError, PatchError, BaseMismatch, ModelError, HubError, UsageError.
    """
    start = time.perf_counter()
    tell = on_step or (lambda phase, done, total: None)
    asked = _Asked(
        as_facts(facts, "evaluate"), choose_protocols(protocols), read_corpus(text), text_bound, abilities, chat,
        batch_size, on_error, tell,
    )  # fmt: skip
    tell("load", 0, 1)
    subject, before, after = both_sides(what, model, base, How(revision, device, dtype, force, asked.fit), asked.of)
    return _evaluation(asked, subject, before, after, start)


class _Asked:
    """What is asked of a model; of the second side just what was asked of the first."""

    def __init__(
        self, facts: list[Fact], chosen: tuple[str, ...], corpus: Corpus, bound: float | None,
        abilities: AbilityTasks | None, chat: bool, batch_size: int | None, on_error: str, tell: OnStep,
    ) -> None:  # fmt: skip
        self.facts, self.chosen, self.corpus, self.abilities = facts, chosen, corpus, abilities
        self.chat, self.batch_size, self.on_error, self.tell = chat, batch_size, on_error, tell
        self.fits = False  # the facts, into what the model reads
        self.bound = bound
        self.text: TextLoss | None = None  # of the side that was asked first

    def fit(self, model: Any, tokenizer: Any) -> None:
        if not self.fits:  # both sides read alike
            how: dict[str, Any] = {"chat": self.chat, "on_error": self.on_error}
            self.facts, self.fits = fitted(self.facts, tokenizer, window(model), **how), True

    def of(self, loaded: Loaded, side: str) -> Observation:
        def step(name: str) -> Callable[[int, int], None]:
            return lambda done, total: self.tell(f"{side}: {name}", done, total)

        def read() -> TextLoss:
            which: dict[str, Any] = {"bound": self.bound, "like": self.text}
            return text_loss(loaded.model, loaded.tokenizer, self.corpus.texts, on_step=step("perplexity"), **which)

        # Asked of the model before the edit alone.
        needed = conditions(self.facts, BOTH) if side == "before" else []
        found = _observe(loaded, self, read, step, needed)
        self.text = self.text or found.text
        if self.abilities is None:
            return found
        tasks = ask_tasks(self.abilities, loaded, chat=self.chat, batch_size=self.batch_size or BATCH, step=step)
        return replace(found, abilities=tasks)


def _evaluation(
    asked: _Asked, subject: Subject, before: Observation | None, after: Observation, start: float
) -> Evaluation:
    chosen, corpus, chat, abilities = asked.chosen, asked.corpus, asked.chat, asked.abilities
    count = counting(asked.facts, before.conditions if before else None, BOTH)
    checked, after = count.facts, replace(after, facts=count.answers(after.facts))
    before = replace(before, facts=count.answers(before.facts)) if before else None
    records = _records(checked, subject.records)
    judged = _judge(checked, chosen, before, after)
    settings = {
        "protocols": {name: PROTOCOLS[name].about for name in chosen}, "chat": chat, "dtype": after.dtype,
        "text": corpus.name, "window": after.text.window, "resamples": RESAMPLES, "seed": SEED, "mosectl": __version__,
    }  # fmt: skip
    sides = Sides(after.facts, before.facts if before else None)
    edited = [i for i, r in enumerate(records) if r]
    neighbours = unedited_neighbours(checked, edited)
    measured = tuple(metrics(checked, chosen, judged, records, sides, neighbours))
    moved = _moved(checked, before, after)
    unedited = frozenset(range(len(checked))) - set(edited) if subject.patches else frozenset()
    probes = probe_answers(checked, sides.before, sides.now, neighbours, unedited)
    notes = notes_of(checked, chosen, subject, sides, after.text, asked.bound, corpus, chat, records)
    notes += [*own_notes(checked, measured), *condition_notes(checked, subject, count.left_out)]
    if abilities is not None and after.abilities is not None:
        settings |= {
            "abilities": list(abilities.names),
            "abilities_limit": abilities.limit,
            "lm_eval": abilities.version,
        }
        notes += ability_notes(abilities, after.abilities)
    return Evaluation(
        subject=subject,
        metrics=measured,
        texts=_texts(before, after, corpus),
        abilities=compare_abilities(before.abilities if before else None, after.abilities) if after.abilities else (),
        retention=curve(
            [t.total > 0 for t in judged[1]["generation.reliability"]], [held(r) if r else None for r in records]
        ),
        facts=tuple(_rows(checked, chosen, before, after, judged[1], records)),
        notes=tuple(notes),
        settings=settings,
        seconds=time.perf_counter() - start,
        next_tokens=moved,
        probes=probes,
        cohorts=_cohorts(checked, subject, sides) if subject.in_order else (),
        not_counted=count.left_out,
    )


def _cohorts(facts: Sequence[Fact], subject: Subject, sides: Sides) -> tuple[Cohort, ...]:
    """Of the facts that the patches hold, in the order of the edit; one that was edited twice stands where it was last."""
    at = {(r.prompt, r.target_new): i for i, r in enumerate(subject.records)}
    places = ((at.get((f.prompt, f.target_new)), i) for i, f in enumerate(facts))
    order = sorted((place, i) for place, i in places if place is not None)

    def pick(values: Sequence[T]) -> list[T]:
        return [values[i] for _, i in order]

    right_after = [subject.records[place].right_after for place, _ in order]
    return cohorts(pick(facts), right_after, pick(sides.now), pick(sides.before) if sides.before else None)


def _moved(facts: Sequence[Fact], before: Observation | None, after: Observation) -> tuple[NextToken, ...]:
    if before is None or before.next is None or after.next is None:
        return ()
    return compare_next(before.next, after.next, counted_by(facts, before.facts))


def choose_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """The protocols asked for, in their usual order; none asked for = all.

    Raises:
        UsageError: there is no such protocol.
    """
    if unknown := [n for n in names if n not in PROTOCOLS]:
        raise UsageError(f"--protocol {unknown[0]}: no such protocol", fix=f"choose from {', '.join(PROTOCOLS)}")
    return tuple(n for n in PROTOCOLS if n in names or not names)


# Asking one model.


def _observe(
    loaded: Loaded, asked: _Asked, read: Callable[[], TextLoss], step: Callable[[str], Callable[[int, int], None]],
    needed: Sequence[Probe],
) -> Observation:  # fmt: skip
    """Ask everything; what cannot be encoded is told first."""
    model, tokenizer, facts, chat = loaded.model, loaded.tokenizer, asked.facts, asked.chat
    pairs = [pair for f in facts for name in asked.chosen for pair in PROTOCOLS[name].needs(f)]
    pairs += [paired(f, f.prompt, f.target_new) for f in facts]
    encoded = encode_pairs(tokenizer, pairs, chat)
    scores = score(model, encoded, batch_size=asked.batch_size, on_step=step("tokens"))
    hops = [portable_probes(f) for f in facts]
    how: dict[str, Any] = {"chat": chat, "batch_size": asked.batch_size, "on_step": step("answers")}
    also: dict[str, Any] = {"probes": own_probes(facts, chat), "texts": asked.corpus.texts, "conditions": needed}
    said = talk(model, tokenizer, facts, hops, scores, long=True, **also, **how)
    heard = zip(answers_of(said.interview), said.portable, strict=True)
    return Observation(
        facts=tuple(replace(a, portable=portable, scores=scores) for a, portable in heard),
        probabilities=tuple(a.probability for a in said.interview.answers),
        entropy=tuple(map(ngram_entropy, said.long)),
        text=read(),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        next=said.interview.next,
        conditions=said.interview.conditions,
    )


# Judging.


def _judge(
    facts: Sequence[Fact], protocols: Sequence[str], before: Observation | None, after: Observation
) -> tuple[Judged | None, Judged]:
    """Tallies before (against itself, so that nothing counts as moved) and after; always with `generation`."""

    def judge(now: Observation) -> Judged:
        out: Judged = {}
        for name in dict.fromkeys(("generation", *protocols)):
            for i, fact in enumerate(facts):
                tallies = PROTOCOLS[name].judge(fact, now.facts[i], before.facts[i] if before else None)
                for metric in METRICS:
                    out.setdefault(f"{name}.{metric}", []).append(tallies[metric])
        return out

    return judge(before) if before else None, judge(after)


def _records(facts: Sequence[Fact], recorded: Sequence[PatchFact]) -> list[PatchFact | None]:
    """What was recorded about each fact; the last patch that made it counts."""
    known = {(r.prompt, r.target_new): r for r in recorded}
    return [known.get((f.prompt, f.target_new)) for f in facts]


def _texts(before: Observation | None, after: Observation, corpus: Corpus) -> tuple[TextMetric, ...]:
    def fluency(o: Observation) -> Measure | None:
        return measure([Tally(e, 1.0) for e in o.entropy])

    def perplexity(o: Observation) -> Measure | None:
        return measure(o.text.texts, np.exp)

    what = f"2- and 3-gram entropy of {MAX_NEW_TOKENS} greedy tokens' words after each edit prompt, bits (arXiv 2202.05262)"
    text = f"{corpus.name}, {after.text.tokens:,} tokens in windows of {after.text.window}; interval over its texts"
    return (
        TextMetric("fluency", what, fluency(before) if before else None, fluency(after)),
        TextMetric("perplexity", text, perplexity(before) if before else None, perplexity(after)),
    )


def _rows(
    facts: Sequence[Fact],
    protocols: Sequence[str],
    before: Observation | None,
    after: Observation,
    judged: Judged,
    records: Sequence[PatchFact | None],
) -> list[EvaluatedFact]:
    def share(tally: Tally) -> float | None:
        return tally.total / tally.weight if tally.weight else None

    return [
        EvaluatedFact(
            prompt=fact.prompt,
            subject=fact.subject,
            target_new=fact.target_new,
            before=answer(before.facts[i].said) if before else None,
            right_after=_right_after(record) if record else None,
            after=answer(after.facts[i].said),
            probability_before=before.probabilities[i] if before else None,
            probability_after=after.probabilities[i],
            holds=says(after.facts[i].said, *fact.targets),
            held_right_after=held(record) if record else None,
            shares={f"{p}.{m}": share(judged[f"{p}.{m}"][i]) for p in protocols for m in METRICS},
        )
        for i, (fact, record) in enumerate(zip(facts, records, strict=True))
    ]


def _right_after(record: PatchFact) -> str:
    """The answer that :func:`mosectl.measure.metrics.held` judges."""
    return record.after if record.right_after is None else record.right_after


# Tables.


def to_csv(evaluation: Evaluation) -> bytes:
    """One row a fact: prompt, subject, target, the answers, and its share under every protocol (empty: not asked)."""
    names = list(evaluation.facts[0].shares)
    head = ["prompt", "subject", "target_new", "before", "right_after", "after", "probability_before"]
    rows: list[list[str | float | None]] = []
    for f in evaluation.facts:
        row = [f.prompt, f.subject, f.target_new, f.before, f.right_after, f.after, f.probability_before]
        rows.append([*row, f.probability_after, *(f.shares[n] for n in names)])
    return csv_bytes([*head, "probability_after", *names], rows)
