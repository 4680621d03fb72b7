"""Facts files: every shape people have, each line checked before a model is loaded.

| shape       | fields                                                                                                |
|-------------|-------------------------------------------------------------------------------------------------------|
| own         | prompt, subject, target_new, [ground_truth, rephrase_prompts, locality, portability]                  |
| EasyEdit    | the same with rephrase_prompt, locality_prompt, locality_ground_truth, portability_…, or nested       |
| CounterFact | requested_rewrite{prompt with {}, subject, target_new{str}, target_true{str}}, paraphrase_prompts, …  |
| zsRE        | src, subject, alt, answers, rephrase, loc, loc_ans                                                    |

as .jsonl (one object a line), .json (a list, or {"facts": [...]} or {"data": [...]}) or .csv/.tsv (a header; several values
in one cell separated by "|"). The shape is found row by row; entries.py lists every name that is read, other fields are
told once a file. "{}" stands for the subject.
Spaces at the end of a prompt are cut off: tokenizers put them before the next word. Line breaks and tabs stay.
The target follows the prompt behind one space, or none where script or prompt ask for none (words.py): 中国的首都是 + 上海,
after a line break, after an opening quotation mark. "space_before_target": true or false in a row decides for its prompts.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, UsageError
from mosectl.facts.entries import MOST_UNKNOWN, Entry, nearest, short, unused
from mosectl.facts.readers import MAX_LINE as MAX_LINE
from mosectl.facts.readers import SAMPLE, bad, read_rows, shown
from mosectl.facts.words import is_word, last_word, surrounding
from mosectl.facts.words import join as join
from mosectl.text.shown import word

MAX_WRONG = 100_000  # entries: what is wrong so often is another kind of file
HINTS = 100  # problems that a likely spelling is searched for: it takes milliseconds each


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is watched; ``answer`` is the known one, if any."""

    prompt: str
    answer: str | None = None
    group: str = ""  # what the file calls the group that it stands in (groups.canonical); "": it names none


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

    def fields(self) -> dict[str, Any]:
        """All of it, for hashes: what a fact does not use is not in it."""
        out = {k: v for k, v in asdict(self).items() if k != "space_before_target" or v is not None}
        for probe in (*out["locality"], *out["portability"]):
            if not probe["group"]:
                del probe["group"]
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


def read_facts(path: str | Path, on_error: str = "fail", limit: int | None = None) -> FactsReport:
    """Read and check a facts file.

    Args:
        path: "-" is standard input.
        on_error: "fail" raises at the end of the check, "skip" leaves bad lines out, "report" returns them as problems.
        limit: take the first ``limit`` entries only; those behind are not checked.
    Raises:
        FactsError: the file cannot be read; a line is wrong ("fail"); no usable fact is left ("fail", "skip").
        UsageError: unknown ``on_error``, or a limit below 1.
    """
    _check_how(on_error, limit)
    file, path = Path(path), shown(Path(path))
    facts: dict[str, Fact] = {}  # by prompt
    problems: list[Problem] = []
    unknown: Counter[str] = Counter()  # fields that are not used
    entries = unusable = 0
    for where, row in read_rows(file):
        entries += 1
        try:
            fact = _fact(row, where, problems, unknown)
            _check_against(fact, facts)
            facts[_plain(fact.prompt)] = fact
        except FactsError as e:
            problems.append(Problem(e.where or where, e.what, e.fix))
            unusable += 1
            if unusable > MAX_WRONG:
                raise bad(
                    path, f"more than {MAX_WRONG:,} entries are wrong: the last, {e.where}: {e.what}", e.fix
                ) from e
        if entries == limit:
            break
    if told := unused(unknown):
        problems.append(Problem(str(path), *told, "warning"))
    report = FactsReport(tuple(facts.values()), tuple(problems), unusable)
    if on_error != "report":
        _check_usable(report, path, entries, skip=on_error == "skip")
    return report


def _check_how(on_error: str, limit: int | None) -> None:
    if on_error not in ("fail", "skip", "report"):
        raise UsageError(f"--on-error {on_error}: no such way", fix="choose fail or skip")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: out of range", fix="give 1 or more")


def _check_usable(report: FactsReport, path: Path, entries: int, *, skip: bool) -> None:
    if not entries:
        raise bad(path, "holds no fact", SAMPLE)
    errors = [p for p in report.problems if p.severity == "error"]
    if errors and not skip:
        raise _summary(path, errors, entries)
    if not report.facts and skip:
        raise bad(path, f"none of the {entries} entries is usable", f"run: mosectl check {word(path)}")


def one_fact(prompt: str, subject: str, target: str) -> FactsReport:
    """One fact as options state it, checked as a line of a file is.

    Raises:
        FactsError: the subject is not in the prompt, or a text is empty or not usable.
    """
    problems: list[Problem] = []
    row = {"prompt": prompt, "subject": subject, "target_new": target}
    return FactsReport((_fact(row, "the fact given", problems, Counter()),), tuple(problems), 0)


def fact_from_dict(row: Mapping[str, Any], source: str) -> Fact:
    """One fact from a row of any shape.

    Raises:
        FactsError: a field is missing or wrong.
    """
    return _fact(row, source, [], Counter())


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


def _summary(path: Path, errors: Sequence[Problem], entries: int) -> FactsError:
    if len(errors) == 1:
        return bad(errors[0].where, errors[0].what, f"{errors[0].fix} (--on-error skip leaves the line out)")
    shown = "".join(f"\n  {p.where}: {p.what} → {p.fix}" for p in errors[:5])
    more = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    fix = f"run: mosectl check {word(path)}   (--on-error skip leaves bad entries out)"
    return bad(path, f"{len(errors)} of {entries} entries are wrong{shown}{more}", fix)


# Rows to facts.


def _fact(row: Any, where: str, problems: list[Problem], unknown: Counter[str]) -> Fact:
    if isinstance(row, FactsError):
        raise row
    entry = Entry(row, where)
    prompt, subject, target = entry.text("prompt", lines=True), entry.text("subject"), entry.text("target_new")
    prompt = entry.filled_in(prompt, subject)
    if (at := last_word(prompt, subject)) < 0:
        fix = nearest(subject, prompt) if len(problems) < HINTS else "write the subject as the prompt spells it"
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
    locality, portability = (tuple(Probe(*p) for p in entry.probes(field)) for field in ("locality", "portability"))
    space = entry.flag("space_before_target")
    asked = (prompt, *kept, *(p.prompt for p in (*locality, *portability)))
    if broken := next(
        (a for a in asked if a.endswith("\n") and a.count("\n") == 1), ""
    ):  # a rendered template has more
        what = f"'{short(broken.rstrip())}' ends with a line break: the answer is asked for on the next line"
        entry.notes.append((what, "remove the line break if that is not meant"))
    problems += [Problem(where, what, fix, "warning") for what, fix in entry.notes]
    unknown.update(n for n in entry.unknown if n in unknown or len(unknown) < MOST_UNKNOWN)
    truth = truths[0] if truths else None
    return Fact(prompt, subject, target, truth, kept, locality, portability, where, space)


def _check_against(fact: Fact, earlier: Mapping[str, Fact]) -> None:
    """Refuse a fact that repeats or contradicts one before it."""
    other = earlier.get(_plain(fact.prompt))
    if other is None:
        return
    line = other.source.rsplit("/", 1)[-1]
    if _plain(other.target_new) == _plain(fact.target_new):
        raise bad(fact.source, f"stands already in {line}", "remove one of the two")
    here, there = short(fact.target_new), short(other.target_new)
    what = f"contradicts {line}: '{short(fact.prompt)}' → '{here}' here, '{there}' there"
    raise bad(fact.source, what, "keep one of the two")


def _plain(text: str) -> str:
    """What two texts share that only differ in spacing or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())
