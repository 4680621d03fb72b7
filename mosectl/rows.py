"""Facts files to rows: .jsonl (one object a line), .json (a list, or {"facts": [...]}) and .csv/.tsv with a header.

Each row comes with its place, file:line or file[index]. A row that cannot be read is handed on as the FactsError it
deserves, so that the caller may go on with the next.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError

MAX_LINE = 100_000  # characters; no fact is that long, a wrong file often is
SAMPLE = 'give lines like {"prompt": …, "subject": …, "target_new": …}'
_OTHER_NAMES = {  # what people write for a required field, where the spelling alone does not tell
    "prompt": ("question", "text", "query"),
    "subject": ("entity", "name"),
    "target_new": ("target", "object", "answer", "new_answer", "completion"),
}
_NOT_MEANT = ("rephrase_prompt", "rephrase_prompts", "locality_prompt", "portability_prompt", "target_true")


def bad(where: object, what: str, fix: str) -> FactsError:
    """The error to raise, or to hand on."""
    return FactsError(what, where=str(where), fix=fix)


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and row of each entry of a facts file; the row is a FactsError where it cannot be read.

    Raises:
        FactsError: the file as a whole cannot be read.
    """
    text = _text(path)
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if start not in ("[", "{") and suffix in (".csv", ".tsv"):
        return _csv_rows(path, text)
    if start in ("[", "{") or suffix in (".jsonl", ".json"):
        return _json_rows(path, text)
    raise bad(path, "not a facts file", "give .jsonl, .json or .csv (mosectl edit --help)")


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise bad(path, "is a folder", "give the facts file in it")
        with path.open("rb") as file:
            data = file.read(1 << 16)
            _refuse_binary(path, data)  # before reading a checkpoint of many gigabytes
            data += file.read()
    except FileNotFoundError as e:
        raise bad(path, "no such file", "check the path") from e
    except (OSError, ValueError) as e:
        raise bad(path, f"cannot be read: {getattr(e, 'strerror', None) or e}", "check path and permissions") from e
    _refuse_binary(path, data)
    bom = 3 * data.startswith(b"\xef\xbb\xbf")
    try:
        text = data[bom:].decode("utf-8")
    except UnicodeDecodeError as e:
        line = data[: bom + e.start].count(b"\n") + 1
        raise bad(f"{path}:{line}", f"is not UTF-8 text (byte {bom + e.start})", "save it as UTF-8") from e
    if not text.strip():
        raise bad(path, "is empty", SAMPLE)
    return text


def _refuse_binary(path: Path, data: bytes) -> None:
    # JSON and CSV begin with an ASCII character: every other byte is then 0 in UTF-16, with or without a mark.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 3 and b"\0\0" in (data[0:4:2], data[1:4:2])):
        raise bad(path, "is UTF-16, not UTF-8", "save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        where = f"{path}:{data[:at].count(10) + 1}"
        raise bad(where, f"is a binary file, not UTF-8 text (byte {at} is 0)", "give .jsonl, .json or .csv")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    listed = text.lstrip()[0] == "["
    whole: Any = None
    try:
        whole = json.loads(text)  # of many lines of objects it reads only the first
    except RecursionError as e:
        if listed:
            raise bad(path, "JSON nested too deep", "give a flat list of objects") from e
    except ValueError as e:
        # A complete list with something behind it may be one bad line among good ones.
        if listed and not (path.suffix.lower() == ".jsonl" and "Extra data" in str(e)):
            line, column = getattr(e, "lineno", 1), getattr(e, "colno", 1)
            raise bad(f"{path}:{line}", f"not JSON: {_reason(e)} (column {column})", "mend the JSON") from e
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
        return bad(where, f"a line of {len(line):,} characters", f"keep it under {MAX_LINE:,}")
    try:
        return json.loads(line)
    except ValueError as e:
        what = f"not JSON: {_reason(e)} (column {getattr(e, 'colno', 1)})"
        return bad(where, what, "put one JSON object on each line")
    except RecursionError:
        return bad(where, "JSON nested too deep", "put one flat JSON object on each line")


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
            fix = 'close every quote; within a cell write it twice: "a ""b"" c"'
            too_long = "field larger" in str(e)
            yield where, bad(where, f"not CSV: {e}", f"keep a line under {MAX_LINE:,}, or {fix}" if too_long else fix)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, where)
        elif len(cells) > len(header):
            yield where, bad(where, "more cells than the header has", 'quote cells with commas: "a, b"')
        elif sum(map(len, cells)) >= MAX_LINE:
            yield where, bad(where, f"a line of {sum(map(len, cells)):,} characters", f"keep it under {MAX_LINE:,}")
        else:
            yield where, {k: _cell(k, v) for k, v in zip(header, cells, strict=False)}


def _header(cells: Sequence[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    required = ("src", "subject", "alt") if "src" in header else tuple(_OTHER_NAMES)
    missing = [name for name in required if name not in header]
    if len(missing) == len(required):
        raise bad(where, "the first line is not a header", "begin with: prompt,subject,target_new")
    if missing:
        raise bad(where, f"column '{missing[0]}' is missing", rename(missing[0], header, f"add it: {missing[0]}"))
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise bad(where, f"column '{twice[0]}' stands there twice", "rename one of the two")
    return header


def _cell(name: str, value: str) -> str | list[str]:
    several = name.startswith(("rephrase", "locality", "portability")) and "|" in value
    return [part.strip() for part in value.split("|")] if several else value


def rename(field: str, given: Sequence[object], otherwise: str) -> str:
    """Did-you-mean for a missing field."""
    names = {str(g).strip().lower(): g for g in given if g not in _NOT_MEANT and g not in _OTHER_NAMES}
    near = [n for n in _OTHER_NAMES.get(field, ()) if n in names]
    near += difflib.get_close_matches(field, list(names), n=1, cutoff=0.6)
    return f"did you mean '{field}' where it says '{names[near[0]]}'?" if near else otherwise
