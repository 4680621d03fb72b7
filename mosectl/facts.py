"""Facts files: every shape people have, each line checked before a model is loaded.

| shape       | fields                                                                                              |
|-------------|-----------------------------------------------------------------------------------------------------|
| own         | prompt, subject, target_new, [ground_truth, rephrase_prompts, locality, portability]                  |
| EasyEdit    | the same with locality_prompt, locality_ground_truth, rephrase_prompt                                 |
| CounterFact | requested_rewrite{prompt with {}, subject, target_new{str}, target_true{str}}, paraphrase_prompts, …  |
| zsRE        | src, subject, alt, answers, rephrase, loc, loc_ans                                                   |

as .jsonl (one object a line), .json (a list) or .csv (a header; several values in one cell separated by "|").
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, UsageError

MAX_LINE = 100_000  # characters; no fact is that long, a wrong file often is


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
    source: str = ""  # file:line


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
        limit: take the first ``limit`` entries only.
    Raises:
        FactsError: the file cannot be read; a line is wrong ("fail"); no usable fact is left ("fail", "skip").
        UsageError: unknown ``on_error``.
    """
    if on_error not in ("fail", "skip", "report"):
        raise UsageError(f"--on-error {on_error}", fix="choose fail or skip")
    path = Path(path)
    facts: list[Fact] = []
    problems: list[Problem] = []
    entries = bad = 0
    for where, row in _rows(path):
        if limit is not None and entries >= limit:
            break
        entries += 1
        try:
            fact = _fact(row, where, problems) if isinstance(row, Mapping) else _reraise(row)
            _check_against(fact, facts)
        except FactsError as e:
            problems.append(Problem(e.where or where, e.what, e.fix))
            bad += 1
        else:
            facts.append(fact)
    if entries == 0 and on_error != "report":
        raise FactsError(
            "holds no fact", where=str(path), fix='give lines like {"prompt":…,"subject":…,"target_new":…}'
        )
    errors = [p for p in problems if p.severity == "error"]
    if errors and on_error == "fail":
        raise _summary(path, errors, entries)
    if not facts and on_error == "skip":
        raise FactsError(f"none of the {entries} entries is usable", where=str(path), fix=f"run: mosectl check {path}")
    return FactsReport(tuple(facts), tuple(problems), bad)


def fact_from_dict(row: Mapping[str, Any], source: str) -> Fact:
    """One fact from a row of any shape.

    Raises:
        FactsError: a field is missing or wrong.
    """
    return _fact(row, source, [])


def _summary(path: Path, errors: Sequence[Problem], entries: int) -> FactsError:
    if len(errors) == 1:
        return FactsError(errors[0].what, where=errors[0].where, fix=f"{errors[0].fix}, or --on-error skip")
    shown = "".join(f"\n  {p.where}: {p.what} → {p.fix}" for p in errors[:5])
    more = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    return FactsError(
        f"{len(errors)} of {entries} entries are wrong{shown}{more}",
        where=str(path),
        fix=f"run: mosectl check {path}   (--on-error skip leaves bad entries out)",
    )


# Files to rows. A row that cannot be read is handed on as the FactsError it deserves.


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | FactsError]]:
    text = _text(path)
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if suffix == ".csv":
        yield from _csv_rows(path, text)
    elif start == "[":
        yield from _list_rows(path, text)
    elif start == "{" or suffix in (".jsonl", ".json"):
        yield from _line_rows(path, text)
    else:
        raise FactsError("not a facts file", where=str(path), fix="give .jsonl, .json or .csv (mosectl edit --help)")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise FactsError("no such file", where=str(path), fix="check the path") from e
    except OSError as e:
        raise FactsError(f"cannot be read: {e.strerror}", where=str(path), fix="give a facts file") from e
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FactsError("is UTF-16", where=str(path), fix="save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise FactsError(f"is not UTF-8 text (byte {e.start})", where=f"{path}:{line}", fix="save it as UTF-8") from e
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise FactsError("is a binary file (NUL byte)", where=f"{path}:{line}", fix="give .jsonl, .json or .csv")
    if not text.strip():
        raise FactsError("is empty", where=str(path), fix='give lines like {"prompt":…,"subject":…,"target_new":…}')
    return text


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any] | FactsError]]:
    # Only "\n" ends a line: U+2028 and the like may stand in a JSON string.
    lines = text.split("\n")
    try:
        whole = json.loads(text) if path.suffix.lower() == ".json" else None
    except (json.JSONDecodeError, RecursionError):
        whole = None
    if isinstance(whole, dict):
        yield f"{path}:1", whole
        return
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line:
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str, where: str) -> Mapping[str, Any] | FactsError:
    if len(line) >= MAX_LINE:
        return FactsError(f"a line of {len(line):,} characters", where=where, fix=f"keep it under {MAX_LINE:,}")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        return FactsError(f"not JSON: {e.msg} (column {e.colno})", where=where, fix="put one JSON object on each line")
    except RecursionError:
        return FactsError("JSON nested too deep", where=where, fix="put one flat JSON object on each line")
    if not isinstance(row, dict):
        return FactsError(f"a JSON {type(row).__name__}, not an object", where=where, fix='write {"prompt": …}')
    return row


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any] | FactsError]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as e:
        raise FactsError(
            f"not JSON: {e.msg} (column {e.colno})", where=f"{path}:{e.lineno}", fix="mend the JSON"
        ) from e
    except RecursionError as e:
        raise FactsError("JSON nested too deep", where=str(path), fix="give a flat list of objects") from e
    for i, row in enumerate(rows):
        where = f"{path}[{i}]"
        fine = isinstance(row, dict)
        yield where, row if fine else FactsError("not a JSON object", where=where, fix='write {"prompt": …}')


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any] | FactsError]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                yield (
                    where,
                    FactsError("more cells than the header has", where=where, fix='quote cells with commas: "a, b"'),
                )
                continue
            cells = {k.strip(): v for k, v in row.items() if v}
            for key, value in cells.items():
                if key.startswith(("rephrase", "locality", "portability")) and "|" in value:
                    cells[key] = [part.strip() for part in value.split("|")]
            if cells:
                yield where, cells
    except csv.Error as e:
        raise FactsError(f"not CSV: {e}", where=f"{path}:{reader.line_num}", fix="save it as CSV in UTF-8") from e


def _reraise(error: Mapping[str, Any] | FactsError) -> Fact:
    assert isinstance(error, FactsError)
    raise error


# Rows to facts.


def _fact(row: Mapping[str, Any], where: str, problems: list[Problem]) -> Fact:
    flat = _flatten(row, where)
    prompt, subject = _string(flat, "prompt", where), _string(flat, "subject", where)
    target = _string(flat, "target_new", where)
    prompt = prompt.replace("{}", subject).rstrip()
    if subject not in prompt:
        raise FactsError(
            f"subject '{subject}' does not stand in prompt '{_short(prompt)}'",
            where=where,
            fix=_nearest(subject, prompt),
        )
    truth = flat.get("ground_truth")
    if truth is not None:
        truth = _string(flat, "ground_truth", where)
        if truth == target:
            raise FactsError(
                f"target_new equals the old answer '{truth}'", where=where, fix="nothing to change: remove it"
            )
    rephrasings = tuple(r.replace("{}", subject).rstrip() for r in _strings(flat, "rephrase_prompts", where))
    kept = tuple(r for r in dict.fromkeys(rephrasings) if r != prompt)
    if len(kept) < len(rephrasings):
        problems.append(
            Problem(where, "a rephrasing repeats the prompt or another", "it is not counted twice", "warning")
        )
    return Fact(
        prompt, subject, target, truth, kept,
        _probes(flat, "locality", where), _probes(flat, "portability", where), where,
    )  # fmt: skip


def _flatten(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Any known shape as the own one."""
    if isinstance(rewrite := row.get("requested_rewrite"), Mapping):
        true = _nested(rewrite.get("target_true"))
        flat = {"prompt": rewrite.get("prompt"), "subject": rewrite.get("subject"), "ground_truth": true}
        flat["target_new"] = _nested(rewrite.get("target_new"))
        flat["rephrase_prompts"] = row.get("paraphrase_prompts", [])
        # CounterFact's neighbours share the true object.
        flat["locality"] = [{"prompt": p, "ground_truth": true} for p in row.get("neighborhood_prompts", [])]
        return flat
    if "src" in row and "alt" in row:
        answers = row.get("answers")
        flat = {"prompt": row["src"], "subject": row.get("subject"), "target_new": row["alt"]}
        flat["ground_truth"] = answers[0] if isinstance(answers, list) and answers else row.get("pred") or None
        flat["rephrase_prompts"] = row.get("rephrase", [])
        if loc := row.get("loc"):
            flat["locality"] = [{"prompt": str(loc).removeprefix("nq question: "), "ground_truth": row.get("loc_ans")}]
        return flat
    flat = dict(row)
    if "rephrase_prompts" not in flat and (single := flat.get("rephrase_prompt")):
        flat["rephrase_prompts"] = single
    for name in ("locality", "portability"):
        if name not in flat and (prompts := flat.get(f"{name}_prompt")):
            flat[name] = {"prompt": prompts, "ground_truth": flat.get(f"{name}_ground_truth")}
    return flat


def _nested(value: Any) -> Any:
    return value.get("str") if isinstance(value, Mapping) else value


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        near = difflib.get_close_matches(name, [str(k) for k in row], n=1, cutoff=0.5)
        hint = f"did you mean '{name}' where it says '{near[0]}'?" if near else f'add "{name}": "…"'
        raise FactsError(f"'{name}' is missing", where=where, fix=hint)
    if not isinstance(value, str):
        raise FactsError(f"'{name}' is a {type(value).__name__}, not text", where=where, fix=f'write "{name}": "…"')
    if not value.strip():
        raise FactsError(f"'{name}' is empty", where=where, fix="fill it in")
    if any(ord(c) < 32 for c in value.strip()) and name != "prompt":
        raise FactsError(f"'{name}' holds a line break or control character", where=where, fix="remove it")
    if len(value) >= MAX_LINE:
        raise FactsError(f"'{name}' has {len(value):,} characters", where=where, fix=f"keep it under {MAX_LINE:,}")
    return value if name == "prompt" else value.strip()


def _strings(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = row.get(name) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise FactsError(f"'{name}' is not text or a list of texts", where=where, fix=f'write "{name}": ["…"]')
    return [v for v in values if v.strip()]


def _probes(row: Mapping[str, Any], name: str, where: str) -> tuple[Probe, ...]:
    value = row.get(name) or []
    if isinstance(value, Mapping):
        # EasyEdit nests {"neighborhood": {"prompt": …, "ground_truth": …}}.
        entries = [value] if "prompt" in value else [v for v in value.values() if v]
    else:
        entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise FactsError(f"'{name}' is not a list", where=where, fix=f'write "{name}": [{{"prompt": "…"}}]')
    out: list[Probe] = []
    for entry in entries:
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or "prompt" not in entry:
            raise FactsError(
                f"an entry of '{name}' has no prompt", where=where, fix='write {"prompt": "…", "ground_truth": "…"}'
            )
        prompts = _strings(entry, "prompt", where)
        answers = entry.get("ground_truth")
        listed = answers if isinstance(answers, list) and len(answers) == len(prompts) else [answers] * len(prompts)
        out += [Probe(p.rstrip(), _answer(a)) for p, a in zip(prompts, listed, strict=True)]
    return tuple(out)


def _answer(value: Any) -> str | None:
    """The first of several accepted answers, as text."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value.strip() or None if isinstance(value, str) else None


def _nearest(subject: str, prompt: str) -> str:
    """Did-you-mean: the same words in another case, or the most similar stretch of the prompt."""
    at = prompt.lower().find(subject.lower())
    if at >= 0:
        return f"did you mean '{prompt[at : at + len(subject)]}'?"
    words = prompt.split()
    n = len(subject.split())
    stretches = [" ".join(words[i : i + n]).strip(".,;:?!'\"") for i in range(max(1, len(words) - n + 1))]
    near = difflib.get_close_matches(subject, stretches, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "write the subject as the prompt spells it"


def _check_against(fact: Fact, earlier: Sequence[Fact]) -> None:
    """Refuse a fact that repeats or contradicts one before it."""
    for other in reversed(earlier):
        if other.prompt != fact.prompt:
            continue
        line = other.source.rsplit("/", 1)[-1]
        if other.target_new == fact.target_new:
            raise FactsError(f"repeats {line}", where=fact.source, fix="remove one of the two")
        raise FactsError(
            f"contradicts {line}: '{_short(fact.prompt)}' → '{fact.target_new}' here, '{other.target_new}' there",
            where=fact.source,
            fix="keep one of the two",
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
