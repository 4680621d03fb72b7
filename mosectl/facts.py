"""Facts files: every shape people have, each line checked before a model is loaded.

| shape       | fields                                                                                                |
|-------------|-------------------------------------------------------------------------------------------------------|
| own         | prompt, subject, target_new, [ground_truth, rephrase_prompts, locality, portability]                  |
| EasyEdit    | the same with rephrase_prompt, locality_prompt, locality_ground_truth, portability_…, or nested       |
| CounterFact | requested_rewrite{prompt with {}, subject, target_new{str}, target_true{str}}, paraphrase_prompts, …  |
| zsRE        | src, subject, alt, answers, rephrase, loc, loc_ans                                                    |

as .jsonl (one object a line), .json (a list, or {"facts": [...]}) or .csv/.tsv (a header; several values in one cell
separated by "|"). The shape is found row by row; fields nobody knows are ignored. "{}" stands for the subject.
White space at the end of a prompt is cut off: tokenizers put it before the next word.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, UsageError
from mosectl.rows import MAX_LINE, SAMPLE, bad, read_rows, rename
from mosectl.shown import word

_OPTIONAL = (
    *("ground_truth", "target_true", "rephrase_prompts", "rephrase_prompt", "paraphrase_prompts"),
    *("locality", "locality_prompt", "locality_ground_truth", "neighborhood_prompts"),
    *("portability", "portability_prompt", "portability_ground_truth"),
)
_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # and half characters


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is watched; ``answer`` is the known one, if any."""

    prompt: str
    answer: str | None = None


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


def join(prompt: str, target: str) -> str:
    """Prompt and target with one space between them, unless there is white space already."""
    if not prompt or prompt[-1].isspace() or target[:1].isspace():
        return prompt + target
    return f"{prompt} {target}"


def read_facts(path: str | Path, on_error: str = "fail", limit: int | None = None) -> FactsReport:
    """Read and check a facts file.

    Args:
        on_error: "fail" raises at the end of the check, "skip" leaves bad lines out, "report" returns them as problems.
        limit: take the first ``limit`` entries only; those behind are not checked.
    Raises:
        FactsError: the file cannot be read; a line is wrong ("fail"); no usable fact is left ("fail", "skip").
        UsageError: unknown ``on_error``, or a limit below 1.
    """
    if on_error not in ("fail", "skip", "report"):
        raise UsageError(f"--on-error {on_error}: no such way", fix="choose fail or skip")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: out of range", fix="give 1 or more")
    path = Path(path)
    facts: dict[str, Fact] = {}  # by prompt
    problems: list[Problem] = []
    entries = unusable = 0
    for where, row in read_rows(path):
        entries += 1
        try:
            fact = _fact(row, where, problems)
            _check_against(fact, facts)
            facts[_plain(fact.prompt)] = fact
        except FactsError as e:
            problems.append(Problem(e.where or where, e.what, e.fix))
            unusable += 1
        if entries == limit:
            break
    if not entries and on_error != "report":
        raise bad(path, "holds no fact", SAMPLE)
    errors = [p for p in problems if p.severity == "error"]
    if errors and on_error == "fail":
        raise _summary(path, errors, entries)
    if not facts and on_error == "skip":
        raise bad(path, f"none of the {entries} entries is usable", f"run: mosectl check {word(path)}")
    return FactsReport(tuple(facts.values()), tuple(problems), unusable)


def fact_from_dict(row: Mapping[str, Any], source: str) -> Fact:
    """One fact from a row of any shape.

    Raises:
        FactsError: a field is missing or wrong.
    """
    return _fact(row, source, [])


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
        return bad(errors[0].where, errors[0].what, f"{errors[0].fix}, or leave it out: --on-error skip")
    shown = "".join(f"\n  {p.where}: {p.what} → {p.fix}" for p in errors[:5])
    more = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    fix = f"run: mosectl check {word(path)}   (--on-error skip leaves bad entries out)"
    return bad(path, f"{len(errors)} of {entries} entries are wrong{shown}{more}", fix)


# Rows to facts.


def _fact(row: Any, where: str, problems: list[Problem]) -> Fact:
    if isinstance(row, FactsError):
        raise row
    if not isinstance(row, Mapping):
        raise bad(where, f"is {_kind(row)}, not an object", SAMPLE.replace("lines", "entries"))
    entry = _flatten(row, where)
    problems += _unknown_fields(row, where)
    prompt, subject, target = entry.text("prompt", lines=True), entry.text("subject"), entry.text("target_new")
    prompt = prompt.replace("{}", subject).rstrip()
    if subject not in prompt:
        raise bad(where, f"subject '{_short(subject)}' is not in prompt '{_short(prompt)}'", _nearest(subject, prompt))
    truths = entry.answers(entry.fields.get("ground_truth"), "ground_truth")
    if _plain(target) in map(_plain, truths):
        raise bad(where, f"{entry.name('target_new')} equals the old answer '{_short(target)}'", "change or remove it")
    given = [r.replace("{}", subject).rstrip() for r in entry.texts("rephrase_prompts")]
    kept = tuple(r for r in dict.fromkeys(given) if r != prompt)
    locality, portability = entry.probes("locality"), entry.probes("portability")
    if len(kept) < len(given):
        what = "a rephrasing repeats the prompt or another rephrasing"
        problems.append(Problem(where, what, "it is not used", "warning"))
    return Fact(prompt, subject, target, truths[0] if truths else None, kept, locality, portability, where)


def _unknown_fields(row: Mapping[str, Any], where: str) -> list[Problem]:
    """Warnings about fields that look like a misspelt optional one; others are nobody's business."""
    out = []
    for name in map(str, row):
        near = difflib.get_close_matches(name, _OPTIONAL, n=1, cutoff=0.75)
        if near and name not in (*_OPTIONAL, "target_new") and near[0] not in row:
            out.append(Problem(where, f"field '{name}' is not used", f"did you mean '{near[0]}'?", "warning"))
    return out


@dataclass(frozen=True)
class _Entry:
    """One row in the own shape; messages name the fields as the file does."""

    fields: Mapping[str, Any]
    where: str
    names: Mapping[str, str]

    def name(self, field: str) -> str:
        return f"'{self.names.get(field, field)}'"

    def text(self, field: str, *, lines: bool = False) -> str:
        """A required field."""
        value, name = self.fields.get(field), self.name(field)
        if field not in self.fields or (value is None and field in self.names):
            add = f'add {name}: "…"'.replace("'", '"')
            if field == "target_new" and "attribute" in self.fields:
                add = "the file tells what is known ('attribute'), not what shall be: " + add
            raise bad(self.where, f"{name} is missing", rename(field, list(self.fields), add))
        return self.checked(value, field, lines=lines)

    def checked(self, value: Any, field: str, *, lines: bool = True) -> str:
        """``value`` as clean text; ``lines`` allows line breaks and tabs."""
        name = self.name(field)
        if not isinstance(value, str):
            raise bad(self.where, f"{name} is {_kind(value)}, not text", 'write it as "…"')
        if all(c.isspace() or unicodedata.category(c) == "Cf" for c in value):
            raise bad(self.where, f"{name} is empty", "fill it in")
        if not lines and (_BREAK.search(value) or "\t" in value):
            raise bad(self.where, f"{name} holds a line break or tab", "write it on one line")
        if found := _CONTROL.search(value):
            what = f"{name} holds the control character U+{ord(found[0]):04X} at {found.start()}"
            raise bad(self.where, what, "remove it")
        if len(value) >= MAX_LINE:
            raise bad(self.where, f"{name} has {len(value):,} characters", f"keep it under {MAX_LINE:,}")
        return value if lines else value.strip()

    def texts(self, field: str) -> list[str]:
        """An optional text or list of texts; empty ones count as not given."""
        value = self.fields.get(field) or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise bad(self.where, f"{self.name(field)} is not text or a list of texts", 'write ["…", "…"]')
        return [self.checked(v, field) for v in values if v.strip()]

    def answers(self, value: Any, field: str) -> list[str]:
        """The accepted answers, the first being the usual one: text, or a list, or EasyEdit's list of lists."""
        out: list[str] = []
        for v in value if isinstance(value, list | tuple) else [value]:
            for text in v if isinstance(v, list | tuple) else [v]:
                if text is not None and not (isinstance(text, str) and not text.strip()):
                    out.append(self.checked(text, field).strip())
        return out

    def probes(self, field: str) -> tuple[Probe, ...]:
        """Prompts with known answers: a list of objects or texts, one object, or EasyEdit's named groups of them."""
        value = self.fields.get(field) or []
        out: list[Probe] = []
        for entry in _ungroup(value):
            entry = {"prompt": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping) or "prompt" not in entry:
                fix = 'write {"prompt": "…", "ground_truth": "…"}'
                raise bad(self.where, f"an entry of {self.name(field)} has no prompt", fix)
            prompts, answers = entry["prompt"], entry.get("ground_truth")
            if not isinstance(prompts, list | tuple):
                prompts = [prompts]
            if len(prompts) == 1 and not (isinstance(answers, list | tuple) and len(answers) == 1):
                answers = [answers]  # several answers to one prompt are alternatives
            elif not isinstance(answers, list | tuple):
                answers = [answers] * len(prompts)
            if len(answers) != len(prompts):
                what = f"{self.name(field)} has {len(prompts)} prompts and {len(answers)} answers"
                raise bad(self.where, what, "give each prompt one answer")
            for p, a in zip(prompts, answers, strict=True):
                known = self.answers(a, field)
                if p != "":
                    out.append(Probe(self.checked(p, field).rstrip(), known[0] if known else None))
        return tuple(out)


def _ungroup(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and "prompt" not in value and value:
        groups = value.values()
        if all(isinstance(g, Mapping | list) or g is None for g in groups):
            return [entry for g in groups for entry in (g if isinstance(g, list) else [g]) if entry]
    return list(value) if isinstance(value, list | tuple) else [value]


def _flatten(row: Mapping[str, Any], where: str) -> _Entry:
    """Any known shape as the own one."""
    if "requested_rewrite" in row:
        return _counterfact(row, where)
    if "src" in row and "prompt" not in row:
        return _zsre(row, where)
    flat: dict[str, Any] = dict(row)
    names = {}
    if isinstance(target := flat.get("target_new"), Mapping):  # ROME's and MEMIT's requests
        flat["target_new"] = target.get("str")
    if not flat.get("ground_truth"):
        flat["ground_truth"] = _nested(flat.get("target_true"))
    if not flat.get("rephrase_prompts") and "rephrase_prompt" in flat:
        flat["rephrase_prompts"] = flat["rephrase_prompt"]
        names["rephrase_prompts"] = "rephrase_prompt"
    for field in ("locality", "portability"):
        if not flat.get(field) and (prompts := flat.get(f"{field}_prompt")):
            flat[field] = {"prompt": prompts, "ground_truth": flat.get(f"{field}_ground_truth")}
            names[field] = f"{field}_prompt"
    return _Entry(flat, where, names)


def _counterfact(row: Mapping[str, Any], where: str) -> _Entry:
    rewrite = row["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise bad(where, f"'requested_rewrite' is {_kind(rewrite)}, not an object", "see CounterFact's shape")
    names = {f: f"requested_rewrite.{f}" for f in ("prompt", "subject")}
    names |= {"target_new": "requested_rewrite.target_new.str", "ground_truth": "requested_rewrite.target_true.str"}
    names |= {"rephrase_prompts": "paraphrase_prompts", "locality": "neighborhood_prompts"}
    true, neighbours = _nested(rewrite.get("target_true")), row.get("neighborhood_prompts") or []
    flat = {**rewrite, "target_new": _nested(rewrite.get("target_new")), "ground_truth": true}
    flat["rephrase_prompts"] = row.get("paraphrase_prompts")
    # CounterFact's neighbours share the true object.
    flat["locality"] = {"prompt": neighbours, "ground_truth": true} if neighbours else None
    return _Entry(flat, where, names)


def _zsre(row: Mapping[str, Any], where: str) -> _Entry:
    names = {"prompt": "src", "target_new": "alt", "rephrase_prompts": "rephrase", "locality": "loc"}
    flat = {ours: row.get(theirs) for ours, theirs in names.items()}
    flat |= {k: v for k, v in row.items() if k == "subject" or k not in flat}
    names["ground_truth"] = "answers" if row.get("answers") else "pred"
    flat["ground_truth"] = row.get(names["ground_truth"])
    if loc := row.get("loc"):
        loc = loc.removeprefix("nq question: ") if isinstance(loc, str) else loc
        flat["locality"] = [{"prompt": loc, "ground_truth": row.get("loc_ans")}]
    if isinstance(hop := row.get("portability"), Mapping) and "New Question" in hop:  # EasyEdit's addition
        flat["portability"] = {"prompt": hop["New Question"], "ground_truth": hop.get("New Answer")}
    return _Entry(flat, where, names)


def _nested(value: Any) -> Any:
    return value.get("str") if isinstance(value, Mapping) else value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _nearest(subject: str, prompt: str) -> str:
    """Did-you-mean: the same words in another case or Unicode form, or the most similar stretch of the prompt."""
    if found := re.search(re.escape(subject), prompt, re.IGNORECASE):
        return f"did you mean '{_short(found[0])}'?"
    if unicodedata.normalize("NFKC", subject) in unicodedata.normalize("NFKC", prompt):
        return "the same letters in another Unicode form: write both in NFC"
    if " ".join(subject.split()) in " ".join(prompt.split()):
        return "the spaces differ: write the subject as the prompt does, space by space"
    words = prompt.split()[:1000]  # a whole book would take minutes
    n = len(subject.split())
    stretches = [" ".join(words[i : i + n]).strip(".,;:?!'\"") for i in range(max(1, len(words) - n + 1))]
    near = difflib.get_close_matches(subject[:200], stretches, n=1, cutoff=0.6)
    return f"did you mean '{_short(near[0])}'?" if near else "write the subject as the prompt spells it"


def _check_against(fact: Fact, earlier: Mapping[str, Fact]) -> None:
    """Refuse a fact that repeats or contradicts one before it."""
    other = earlier.get(_plain(fact.prompt))
    if other is None:
        return
    line = other.source.rsplit("/", 1)[-1]
    if _plain(other.target_new) == _plain(fact.target_new):
        raise bad(fact.source, f"stands already in {line}", "remove one of the two")
    here, there = _short(fact.target_new), _short(other.target_new)
    what = f"contradicts {line}: '{_short(fact.prompt)}' → '{here}' here, '{there}' there"
    raise bad(fact.source, what, "keep one of the two")


def _plain(text: str) -> str:
    """What two texts share that only differ in spacing or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
