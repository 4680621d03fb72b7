"""Facts files: every shape people have, each line checked before a model is loaded.

An entry is of mosectl's own shape, or of one of a known data set: one reader a shape in :mod:`mosectl.facts.shapes`, all of
them in docs/reference/facts-files.md. Files are .jsonl (one object a line), .json (a list, or {"facts": [...]} or
{"data": [...]}) or .csv/.tsv (a header; several values in one cell separated by "|"). The shape is found row by row; fields
that are not used are told once a file. "{}" stands for the subject.
Spaces at the end of a prompt are cut off: tokenizers put them before the next word. Line breaks and tabs stay.
The target follows the prompt behind one space, or none where script or prompt ask for none (words.py): 中国的首都是 + 上海,
after a line break, after an opening quotation mark. "space_before_target": true or false in a row decides for its prompts.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, UsageError
from mosectl.facts.entries import MOST_UNKNOWN, NO_ANSWER, Entry
from mosectl.facts.messages import MAX_LINE as MAX_LINE
from mosectl.facts.messages import SAMPLE, bad, kind, nearest, short, unused
from mosectl.facts.probe import Probe as Probe
from mosectl.facts.readers import read_rows
from mosectl.facts.shapes import Chosen, shape_of
from mosectl.facts.shapes.mquake import SINGLE_HOP
from mosectl.facts.shapes.own import NAMES, OPTIONAL, OWN, PROBES
from mosectl.facts.shapes.shape import Shape
from mosectl.facts.words import is_word, last_word, surrounding
from mosectl.facts.words import join as join
from mosectl.text.shown import counted, word

MAX_WRONG = 100_000  # entries: what is wrong so often is another kind of file
HINTS = 100  # problems that a likely spelling is searched for: it takes milliseconds each


@dataclass(frozen=True)
class Fact:
    """One edit: after it, ``prompt`` shall be continued with ``target_new``."""

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    source: str = ""  # file:line, or file[index]
    space_before_target: bool | None = None  # between a prompt and what follows it; None: as both ask (words.gap)
    target_aliases: tuple[str, ...] = ()  # other names of the new object: right answers, but not what is edited in

    @property
    def targets(self) -> tuple[str, ...]:
        """All right answers, the new object first."""
        return (self.target_new, *self.target_aliases)

    def fields(self) -> dict[str, Any]:
        """All of it, for hashes: what a fact does not use is not in it."""
        unused = {"space_before_target": None, "target_aliases": ()}
        out = {k: v for k, v in asdict(self).items() if k not in unused or v != unused[k]}
        for probe in (*out["locality"], *out["portability"]):
            for name in ("group", "aliases", "needs"):
                if not probe[name]:
                    del probe[name]
        return out


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line, and what to do."""

    where: str
    what: str
    fix: str
    severity: str = "error"  # or "warning": the fact is used all the same


@dataclass(frozen=True)
class FactsReport:
    """The usable facts of a file and everything that was found wrong in it."""

    facts: tuple[Fact, ...]
    problems: tuple[Problem, ...]
    skipped: int  # lines left out
    shapes: tuple[str, ...] = ()  # which entries are not of mosectl's own shape, and what of theirs is read for what


@dataclass
class _Seen:
    """What is said of a file as a whole, gathered entry by entry."""

    problems: list[Problem] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)  # fields that are not used
    remarks: Counter[tuple[str, str]] = field(default_factory=Counter)  # what happens, and how to avoid it
    shapes: Counter[str] = field(default_factory=Counter)


def read_facts(
    path: str | Path, on_error: str = "fail", limit: int | None = None, read: Chosen | None = None
) -> FactsReport:
    """Read and check a facts file.

    Args:
        path: "-" is standard input; hf://datasets/user/repo[@revision][/file][#split] a data set on the Hub.
        on_error: "fail" raises at the end of the check, "skip" leaves bad lines out, "report" returns them as problems.
        limit: take the first ``limit`` entries only; those behind are not checked. (An entry of MQuAKE is several facts.)
        read: what fields are called in this file (:func:`mosectl.facts.choices.choices`): for one of ours, theirs.
    Raises:
        FactsError: the file cannot be read; a line is wrong ("fail"); no usable fact is left ("fail", "skip").
        UsageError: unknown ``on_error``, or a limit below 1. HubError: a data set is gated, or the Hub out of reach.
    """
    _check_how(on_error, limit)
    chosen, seen = read or {}, _Seen()
    facts: dict[str, Fact] = {}  # by prompt
    entries = unusable = 0
    name, rows = read_rows(path, chosen)
    for where, row in rows:
        entries += 1
        try:
            facts |= _new_ones(*_facts(row, where, seen, chosen), facts, seen)
        except FactsError as e:
            seen.problems.append(Problem(e.where or where, e.what, e.fix))
            unusable += 1
            if unusable > MAX_WRONG:
                raise bad(
                    name, f"more than {MAX_WRONG:,} entries are wrong: the last, {e.where}: {e.what}", e.fix
                ) from e
        if entries == limit:
            break
    _leave_edited(facts, seen)
    if told := unused(seen.unknown, (*NAMES, *PROBES), sorted(OPTIONAL)):
        seen.problems.append(Problem(name, *told, "warning"))
    for (what, fix), n in seen.remarks.items():
        seen.problems.append(Problem(name, f"{what} ({counted(n, 'time')})", fix, "warning"))
    shapes = tuple(f"{counted(n, 'entry', 'entries')} read as {name}" for name, n in seen.shapes.items())
    report = FactsReport(tuple(facts.values()), tuple(seen.problems), unusable, shapes)
    if on_error != "report":
        _check_usable(report, name, entries, skip=on_error == "skip")
    return report


def _check_how(on_error: str, limit: int | None) -> None:
    if on_error not in ("fail", "skip", "report"):
        raise UsageError(f"--on-error {on_error}: no such way", fix="choose fail or skip")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: out of range", fix="give 1 or more")


def _check_usable(report: FactsReport, name: str, entries: int, *, skip: bool) -> None:
    if not entries:
        raise bad(name, "holds no fact", SAMPLE)
    errors = [p for p in report.problems if p.severity == "error"]
    if errors and not skip:
        raise _summary(name, errors, entries)
    if not report.facts and skip:
        raise bad(name, f"none of the {entries} entries is usable", f"run: mosectl check {word(name)}")


def one_fact(prompt: str, subject: str, target: str) -> FactsReport:
    """One fact as options state it, checked as a line of a file is.

    Raises:
        FactsError: the subject is not in the prompt, or a text is empty or not usable.
    """
    seen = _Seen()
    row = {"prompt": prompt, "subject": subject, "target_new": target}
    return FactsReport(tuple(_facts(row, "the fact given", seen, {})[1]), tuple(seen.problems), 0)


def fact_from_dict(row: Mapping[str, Any], source: str) -> Fact:
    """One fact from a row of any shape.

    Raises:
        FactsError: a field is missing or wrong; the row is a case of several facts.
    """
    _, (fact, *others) = _facts(row, source, _Seen(), {})
    if others:
        raise bad(source, f"is a case of {1 + len(others)} facts, not one", "write it to a file, for read_facts")
    return fact


def as_facts(facts: str | Path | Sequence[Fact | Mapping[str, Any]], purpose: str) -> list[Fact]:
    """The facts of a file, or those given, as facts or as dicts with the fields of one; ``purpose`` is for the message.

    Raises:
        FactsError: the file or a fact is wrong. UsageError: there is none.
    """
    if isinstance(facts, str | Path):
        return list(read_facts(facts).facts)
    out = [f if isinstance(f, Fact) else fact_from_dict(dict(f), f"fact {i + 1}") for i, f in enumerate(facts)]
    if not out:
        raise UsageError(f"there is no fact to {purpose}", fix="give at least one")
    return out


def _summary(name: str, errors: Sequence[Problem], entries: int) -> FactsError:
    if len(errors) == 1:
        return bad(errors[0].where, errors[0].what, f"{errors[0].fix} (--on-error skip leaves the line out)")
    shown = "".join(f"\n  {p.where}: {p.what} → {p.fix}" for p in errors[:5])
    more = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    fix = f"run: mosectl check {word(name)}   (--on-error skip leaves bad entries out)"
    return bad(name, f"{len(errors)} of {entries} entries are wrong{shown}{more}", fix)


# Rows to facts.


def _facts(row: Any, where: str, seen: _Seen, chosen: Chosen) -> tuple[Shape, list[Fact]]:
    """An entry's shape, and its facts: one, or in MQuAKE those of a case, none of which is of use without the others.

    Raises:
        FactsError: one of them is wrong.
    """
    if isinstance(row, FactsError):
        raise row
    if not isinstance(row, Mapping):
        raise bad(where, f"is {kind(row)}, not an object", SAMPLE.replace("lines", "entries"))
    shape = shape_of(row)
    parts = list(shape.parts(row, where))
    places = [where] if len(parts) == 1 else [f"{where} edit {i + 1}" for i in range(len(parts))]
    entries = [Entry(part, shape, place, chosen) for part, place in zip(parts, places, strict=True)]
    facts = [_fact(entry, seen) for entry in entries]
    for entry, part in zip(entries, parts, strict=True):
        seen.problems += [Problem(entry.where, what, fix, "warning") for what, fix in entry.notes]
        seen.unknown.update(n for n in entry.unknown if n in seen.unknown or len(seen.unknown) < MOST_UNKNOWN)
        seen.remarks.update((*(part.remarks if "subject" not in chosen else ()), *entry.remarks))
    if shape is not OWN or chosen:
        seen.shapes[f"{shape.name}: {entries[0].origins()}".removesuffix(": ")] += 1
    return shape, facts


def _fact(entry: Entry, seen: _Seen) -> Fact:
    where, prompt = entry.where, entry.text("prompt", lines=True)
    subject, (target, aliases) = entry.subject(prompt), entry.target()
    prompt = entry.filled_in(prompt, subject)
    if (at := last_word(prompt, subject)) < 0:
        fix = nearest(subject, prompt) if len(seen.problems) < HINTS else "write the subject as the prompt spells it"
        raise bad(where, f"subject '{short(subject)}' is not in prompt '{short(prompt)}'", fix)
    if not is_word(prompt, at, at + len(subject)):
        other = short(surrounding(prompt, at, at + len(subject)))
        entry.notes.append((f"subject '{short(subject)}' stands only inside a longer word, '{other}'", "edited there"))
    truths = entry.truths()
    if _plain(target) in map(_plain, truths):
        raise bad(where, f"{entry.name('target_new')} equals the old answer '{short(target)}'", "change or remove it")
    given = [entry.filled_in(r, subject) for r in entry.rephrasings()]
    kept = tuple(r for r in dict.fromkeys(given) if r != prompt)
    if len(kept) < len(given):
        entry.notes.append(("a rephrasing repeats the prompt or another rephrasing", "it is not used"))
    locality, portability = (tuple(entry.probes(f)) for f in ("locality", "portability"))
    if any(p.prompt == prompt for p in locality):
        entry.notes.append(("a locality prompt is the fact's own prompt, whose answer shall change", "it is not used"))
        locality = tuple(p for p in locality if p.prompt != prompt)
    entry.remarks += [NO_ANSWER for p in portability if p.answer is None]
    space = entry.flag("space_before_target")
    _note_line_breaks(entry, (prompt, *kept, *(p.prompt for p in (*locality, *portability))))
    truth = truths[0] if truths else None
    right = _not_old(entry, aliases, truths)
    return Fact(prompt, subject, target, truth, kept, locality, portability, where, space, right)


def _not_old(entry: Entry, aliases: tuple[str, ...], truths: Sequence[str]) -> tuple[str, ...]:
    """The aliases of the new object that are not names of the old one."""
    old = {*map(_plain, truths)}
    if both := [a for a in aliases if _plain(a) in old]:
        entry.notes.append(
            (f"'{short(both[0])}' is an alias of the new object and the old one", "it is not a right answer")
        )
    return tuple(a for a in aliases if _plain(a) not in old)


def _note_line_breaks(entry: Entry, asked: Sequence[str]) -> None:
    broken = next((a for a in asked if a.endswith("\n") and a.count("\n") == 1), "")  # a rendered template has more
    if broken:
        what = f"'{short(broken.rstrip())}' ends with a line break: the answer is asked for on the next line"
        entry.notes.append((what, "remove the line break if that is not meant"))


def _new_ones(shape: Shape, facts: Sequence[Fact], earlier: Mapping[str, Fact], seen: _Seen) -> dict[str, Fact]:
    """The facts of an entry by prompt; where cases share an edit, the one before with what is asked of both.

    Raises:
        FactsError: one repeats or contradicts one before it.
    """
    out: dict[str, Fact] = {}
    for fact in facts:
        key = _plain(fact.prompt)
        other = out.get(key, earlier.get(key))
        out[key] = fact if other is None else _joined(other, fact, seen, shape.cases)
    return out


def _joined(other: Fact, fact: Fact, seen: _Seen, cases: bool) -> Fact:
    line = other.source.rsplit("/", 1)[-1]
    if _plain(other.target_new) != _plain(fact.target_new):
        here, there = short(fact.target_new), short(other.target_new)
        what = f"contradicts {line}: '{short(fact.prompt)}' → '{here}' here, '{there}' there"
        raise bad(fact.source, what, "keep one of the two")
    if not cases:
        raise bad(fact.source, f"stands already in {line}", "remove one of the two")
    seen.remarks["an edit stands in a case before", "it is made once, with the questions of both"] += 1
    both: dict[str, Any] = {
        name: tuple(dict.fromkeys((*getattr(other, name), *getattr(fact, name))))
        for name in ("rephrase_prompts", "locality", "portability", "target_aliases")
    }
    return replace(other, **both)


def _leave_edited(facts: dict[str, Fact], seen: _Seen) -> None:
    """Take out single hops of cases, which hold before and after, that another case edits."""
    for key, fact in facts.items():
        kept = tuple(p for p in fact.locality if p.group != SINGLE_HOP or _plain(p.prompt) not in facts)
        if n := len(fact.locality) - len(kept):
            facts[key] = replace(fact, locality=kept)
            seen.remarks["a single hop of a case is edited in another", "it is not asked"] += n


def _plain(text: str) -> str:
    """What two texts share that only differ in spacing or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())
