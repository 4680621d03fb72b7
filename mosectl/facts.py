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

import csv
import difflib
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, UsageError

MAX_LINE = 100_000  # characters; no fact is that long, a wrong file often is
_SAMPLE = 'give lines like {"prompt": …, "subject": …, "target_new": …}'
_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # and half characters
_OTHER_NAMES = {  # what people write for a required field, where the spelling alone does not tell
    "prompt": ("question", "text", "query"),
    "subject": ("entity", "name"),
    "target_new": ("target", "object", "answer", "new_answer", "completion"),
}
_NOT_MEANT = ("rephrase_prompt", "rephrase_prompts", "locality_prompt", "portability_prompt", "target_true")


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
        raise UsageError(f"--on-error {on_error}", fix="choose fail or skip")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", fix="give 1 or more")
    path = Path(path)
    facts: dict[str, Fact] = {}  # by prompt
    problems: list[Problem] = []
    entries = bad = 0
    for where, row in _rows(path):
        entries += 1
        try:
            fact = _fact(row, where, problems)
            _check_against(fact, facts)
            facts[_plain(fact.prompt)] = fact
        except FactsError as e:
            problems.append(Problem(e.where or where, e.what, e.fix))
            bad += 1
        if entries == limit:
            break
    if not entries and on_error != "report":
        raise _bad(path, "holds no fact", _SAMPLE)
    errors = [p for p in problems if p.severity == "error"]
    if errors and on_error == "fail":
        raise _summary(path, errors, entries)
    if not facts and on_error == "skip":
        raise _bad(path, f"none of the {entries} entries is usable", f"run: mosectl check {path}")
    return FactsReport(tuple(facts.values()), tuple(problems), bad)


def fact_from_dict(row: Mapping[str, Any], source: str) -> Fact:
    """One fact from a row of any shape.

    Raises:
        FactsError: a field is missing or wrong.
    """
    return _fact(row, source, [])


def _bad(where: object, what: str, fix: str) -> FactsError:
    return FactsError(what, where=str(where), fix=fix)


def _summary(path: Path, errors: Sequence[Problem], entries: int) -> FactsError:
    if len(errors) == 1:
        return _bad(errors[0].where, errors[0].what, f"{errors[0].fix}, or leave it out: --on-error skip")
    shown = "".join(f"\n  {p.where}: {p.what} → {p.fix}" for p in errors[:5])
    more = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    fix = f"run: mosectl check {path}   (--on-error skip leaves bad entries out)"
    return _bad(path, f"{len(errors)} of {entries} entries are wrong{shown}{more}", fix)


# Files to rows. A row that cannot be read is handed on as the FactsError it deserves.


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _text(path)
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if start not in ("[", "{") and suffix in (".csv", ".tsv"):
        return _csv_rows(path, text)
    if start in ("[", "{") or suffix in (".jsonl", ".json"):
        return _json_rows(path, text)
    raise _bad(path, "not a facts file", "give .jsonl, .json or .csv (mosectl edit --help)")


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise _bad(path, "is a folder", "give the facts file in it")
        with path.open("rb") as file:
            data = file.read(1 << 16)
            _refuse_binary(path, data)  # before reading a checkpoint of many gigabytes
            data += file.read()
    except FileNotFoundError as e:
        raise _bad(path, "no such file", "check the path") from e
    except (OSError, ValueError) as e:
        raise _bad(path, f"cannot be read: {getattr(e, 'strerror', None) or e}", "check path and permissions") from e
    _refuse_binary(path, data)
    bom = 3 * data.startswith(b"\xef\xbb\xbf")
    try:
        text = data[bom:].decode("utf-8")
    except UnicodeDecodeError as e:
        line = data[: bom + e.start].count(b"\n") + 1
        raise _bad(f"{path}:{line}", f"is not UTF-8 text (byte {bom + e.start})", "save it as UTF-8") from e
    if not text.strip():
        raise _bad(path, "is empty", _SAMPLE)
    return text


def _refuse_binary(path: Path, data: bytes) -> None:
    # JSON and CSV begin with an ASCII character: every other byte is then 0 in UTF-16, with or without a mark.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 3 and b"\0\0" in (data[0:4:2], data[1:4:2])):
        raise _bad(path, "is UTF-16, not UTF-8", "save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        where = f"{path}:{data[:at].count(10) + 1}"
        raise _bad(where, f"is a binary file, not UTF-8 text (byte {at} is 0)", "give .jsonl, .json or .csv")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    listed = text.lstrip()[0] == "["
    whole: Any = None
    try:
        whole = json.loads(text)  # of many lines of objects it reads only the first
    except RecursionError as e:
        if listed:
            raise _bad(path, "JSON nested too deep", "give a flat list of objects") from e
    except ValueError as e:
        # A complete list with something behind it may be one bad line among good ones.
        if listed and not (path.suffix.lower() == ".jsonl" and "Extra data" in str(e)):
            line, column = getattr(e, "lineno", 1), getattr(e, "colno", 1)
            raise _bad(f"{path}:{line}", f"not JSON: {_reason(e)} (column {column})", "mend the JSON") from e
    if isinstance(whole, dict) and isinstance(whole.get("facts"), list) and "prompt" not in whole:
        whole = whole["facts"]
    if isinstance(whole, list):
        yield from ((f"{path}[{i}]", row) for i, row in enumerate(whole))
    elif isinstance(whole, dict) and "\n" in text.strip():  # one object, printed over several lines
        yield f"{path}:1", whole
    else:
        # Only "\n" ends a line: U+2028 and the like may stand in a JSON string.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.strip().lstrip("\ufeff"), f"{path}:{number}")


def _parse(line: str, where: str) -> Any:
    if len(line) >= MAX_LINE:
        return _bad(where, f"a line of {len(line):,} characters", f"keep it under {MAX_LINE:,}")
    try:
        return json.loads(line)
    except ValueError as e:
        what = f"not JSON: {_reason(e)} (column {getattr(e, 'colno', 1)})"
        return _bad(where, what, "put one JSON object on each line")
    except RecursionError:
        return _bad(where, "JSON nested too deep", "put one flat JSON object on each line")


def _reason(error: ValueError) -> str:
    return getattr(error, "msg", "a number is too long")  # the one other ValueError of json.loads


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    first = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield where, _bad(where, f"not CSV: {e}", 'close every quote; within a cell write it twice: "a ""b"" c"')
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, where)
        elif len(cells) > len(header):
            yield where, _bad(where, "more cells than the header has", 'quote cells with commas: "a, b"')
        elif sum(map(len, cells)) >= MAX_LINE:
            yield where, _bad(where, f"a line of {sum(map(len, cells)):,} characters", f"keep it under {MAX_LINE:,}")
        else:
            yield where, {k: _cell(k, v) for k, v in zip(header, cells, strict=False)}


def _header(cells: Sequence[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    required = ("src", "subject", "alt") if "src" in header else tuple(_OTHER_NAMES)
    missing = [name for name in required if name not in header]
    if len(missing) == len(required):
        raise _bad(where, "the first line is not a header", "begin with: prompt,subject,target_new")
    if missing:
        raise _bad(where, f"column '{missing[0]}' is missing", _rename(missing[0], header, f"add it: {missing[0]}"))
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise _bad(where, f"column '{twice[0]}' stands there twice", "rename one of the two")
    return header


def _cell(name: str, value: str) -> str | list[str]:
    several = name.startswith(("rephrase", "locality", "portability")) and "|" in value
    return [part.strip() for part in value.split("|")] if several else value


# Rows to facts.


def _fact(row: Any, where: str, problems: list[Problem]) -> Fact:
    if isinstance(row, FactsError):
        raise row
    if not isinstance(row, Mapping):
        raise _bad(where, f"is {_kind(row)}, not an object", _SAMPLE.replace("lines", "entries"))
    entry = _flatten(row, where)
    prompt, subject, target = entry.text("prompt", lines=True), entry.text("subject"), entry.text("target_new")
    prompt = prompt.replace("{}", subject).rstrip()
    if subject not in prompt:
        raise _bad(where, f"subject '{_short(subject)}' is not in prompt '{_short(prompt)}'", _nearest(subject, prompt))
    truths = entry.answers(entry.fields.get("ground_truth"), "ground_truth")
    if _plain(target) in map(_plain, truths):
        raise _bad(where, f"{entry.name('target_new')} equals the old answer '{_short(target)}'", "change or remove it")
    given = [r.replace("{}", subject).rstrip() for r in entry.texts("rephrase_prompts")]
    kept = tuple(r for r in dict.fromkeys(given) if r != prompt)
    locality, portability = entry.probes("locality"), entry.probes("portability")
    if len(kept) < len(given):
        what = "a rephrasing repeats the prompt or another rephrasing"
        problems.append(Problem(where, what, "it is not used", "warning"))
    return Fact(prompt, subject, target, truths[0] if truths else None, kept, locality, portability, where)


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
            raise _bad(self.where, f"{name} is missing", _rename(field, list(self.fields), add))
        return self.checked(value, field, lines=lines)

    def checked(self, value: Any, field: str, *, lines: bool = True) -> str:
        """``value`` as clean text; ``lines`` allows line breaks and tabs."""
        name = self.name(field)
        if not isinstance(value, str):
            raise _bad(self.where, f"{name} is {_kind(value)}, not text", 'write it as "…"')
        if all(c.isspace() or unicodedata.category(c) == "Cf" for c in value):
            raise _bad(self.where, f"{name} is empty", "fill it in")
        if not lines and (_BREAK.search(value) or "\t" in value):
            raise _bad(self.where, f"{name} holds a line break or tab", "write it on one line")
        if found := _CONTROL.search(value):
            what = f"{name} holds the control character U+{ord(found[0]):04X} at {found.start()}"
            raise _bad(self.where, what, "remove it")
        if len(value) >= MAX_LINE:
            raise _bad(self.where, f"{name} has {len(value):,} characters", f"keep it under {MAX_LINE:,}")
        return value if lines else value.strip()

    def texts(self, field: str) -> list[str]:
        """An optional text or list of texts; empty ones count as not given."""
        value = self.fields.get(field) or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise _bad(self.where, f"{self.name(field)} is not text or a list of texts", 'write ["…", "…"]')
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
                raise _bad(self.where, f"an entry of {self.name(field)} has no prompt", fix)
            prompts, answers = entry["prompt"], entry.get("ground_truth")
            if not isinstance(prompts, list | tuple):
                prompts = [prompts]
            if len(prompts) == 1 and not (isinstance(answers, list | tuple) and len(answers) == 1):
                answers = [answers]  # several answers to one prompt are alternatives
            elif not isinstance(answers, list | tuple):
                answers = [answers] * len(prompts)
            if len(answers) != len(prompts):
                what = f"{self.name(field)} has {len(prompts)} prompts and {len(answers)} answers"
                raise _bad(self.where, what, "give each prompt one answer")
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
        raise _bad(where, f"'requested_rewrite' is {_kind(rewrite)}, not an object", "see CounterFact's shape")
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


def _rename(field: str, given: Sequence[object], otherwise: str) -> str:
    """Did-you-mean for a missing field."""
    names = {str(g).strip().lower(): g for g in given if g not in _NOT_MEANT and g not in _OTHER_NAMES}
    near = [n for n in _OTHER_NAMES.get(field, ()) if n in names]
    near += difflib.get_close_matches(field, list(names), n=1, cutoff=0.6)
    return f"did you mean '{field}' where it says '{names[near[0]]}'?" if near else otherwise


def _nearest(subject: str, prompt: str) -> str:
    """Did-you-mean: the same words in another case or Unicode form, or the most similar stretch of the prompt."""
    if found := re.search(re.escape(subject), prompt, re.IGNORECASE):
        return f"did you mean '{_short(found[0])}'?"
    if unicodedata.normalize("NFKC", subject) in unicodedata.normalize("NFKC", prompt):
        return "the same letters in another Unicode form: write both in NFC"
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
        raise _bad(fact.source, f"stands already in {line}", "remove one of the two")
    here, there = _short(fact.target_new), _short(other.target_new)
    what = f"contradicts {line}: '{_short(fact.prompt)}' → '{here}' here, '{there}' there"
    raise _bad(fact.source, what, "keep one of the two")


def _plain(text: str) -> str:
    """What two texts share that only differ in spacing or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
