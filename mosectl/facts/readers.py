"""Facts files to rows: .jsonl (one object a line), .json (a list, also as "facts" or "data" of an object), .csv and .tsv.

Each row comes with its place, file:line or file[index]. A row that cannot be read is handed on as the FactsError it
deserves, so that the caller may go on with the next.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError
from mosectl.facts.messages import MAX_LINE, SAMPLE, WHOLE, bad, rename
from mosectl.facts.shapes import Chosen, names_of, shape_of
from mosectl.facts.shapes.own import REQUIRED, SEVERAL
from mosectl.storage.inputs import MAX_JSON, MAX_VALUES, parse_json, read_bytes

MAX_ENTRIES = 1_000_000
STDIN = Path("-")
FIX = "check the path; facts are .jsonl, .json or .csv"
WRAPPERS = ("facts", "data")


def read_rows(path: Path, chosen: Chosen) -> Iterator[tuple[str, Any]]:
    """Place and row of each entry of a facts file; the row is a FactsError where it cannot be read.

    Args:
        chosen: what fields are called, as the user says; the columns of a table have to be there.
    Raises:
        FactsError: the file as a whole cannot be read.
    """
    piped = path == STDIN
    path = shown(path)
    text = _text(path, _stdin() if piped else read_bytes(path, FactsError, FIX))
    suffix, start = ".csv" if piped else path.suffix.lower(), text.lstrip()[:1]
    if start not in ("[", "{") and suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, text, chosen)
    elif start in ("[", "{") or suffix in (".jsonl", ".json"):
        rows = _json_rows(path, text)
    else:
        raise bad(path, "not a facts file", "give .jsonl, .json or .csv (mosectl edit --help)")
    for number, row in enumerate(rows):
        if number == MAX_ENTRIES:
            raise bad(path, f"more than {MAX_ENTRIES:,} entries", "split it")
        yield row


def shown(path: Path) -> Path:
    """A facts file's name in messages."""
    return Path("standard input") if path == STDIN else path


def _text(path: Path, data: bytes) -> str:
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


def _stdin() -> bytes:
    """What is piped in, of bounded size; a person at a terminal would wait for nothing."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise bad("standard input", "no facts are piped in", "mosectl edit - … < facts.jsonl, or give a file")
    data = sys.stdin.buffer.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise bad("standard input", f"more than {MAX_JSON:,} bytes", "split it")
    return data


def _refuse_binary(path: Path, data: bytes) -> None:
    if data[8:10] == b'{"' and data[5:8] == b"\0\0\0":  # the length of a safetensors header
        raise bad(path, "is a safetensors file, such as a patch, not facts", "give .jsonl, .json or .csv")
    # JSON and CSV begin with an ASCII character: every other byte is then 0 in UTF-16, with or without a mark.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 3 and b"\0\0" in (data[0:4:2], data[1:4:2])):
        raise bad(path, "is UTF-16, not UTF-8", "save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        where = f"{path}:{data[:at].count(10) + 1}"
        raise bad(where, f"is a binary file, not UTF-8 text (byte {at} is 0)", "give .jsonl, .json or .csv")


CUT_OFF = "the file seems cut off in its last line: get all of it again, or remove that line"

# JSON. Where an entry ends is found first; the strict reader then takes entry by entry, so that one bad one is one.

_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
_SPACE, _SOLID = re.compile(r"[ \t\n\r]*"), re.compile(r"\S")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    start = _behind_space(text, 0)
    listed = text[start] == "["
    rest = "lines"  # what stands behind the first value
    if sum(map(text.count, ",[{")) <= MAX_VALUES:
        try:
            end = _LENIENT.raw_decode(text, start)[1]
            rest = text[end:].strip()
            if listed and rest and path.suffix.lower() != ".jsonl":
                raise json.JSONDecodeError("Extra data", text, _behind_space(text, end))
        except RecursionError as e:
            if listed:
                raise bad(path, "JSON nested too deep", "give a flat list of objects") from e
        except json.JSONDecodeError as e:
            if listed:
                raise bad(f"{path}:{e.lineno}", f"not JSON: {e.msg} (column {e.colno})", "mend the JSON") from e
    elif listed:
        raise bad(path, f"JSON of more than {MAX_VALUES:,} values", "give one JSON object on each line")
    return _lines(path, text) if rest else _document(path, text, start)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """One JSON value a line. Only a line feed ends a line: U+2028 and the like may stand in a JSON string."""
    at, number = 0, 1
    while found := _SOLID.search(text, at):
        number += text.count("\n", at, found.start())
        at = end if (end := text.find("\n", found.start())) >= 0 else len(text)
        where, line = f"{path}:{number}", text[found.start() : at].strip().lstrip("\ufeff")
        if len(line) >= MAX_LINE:
            yield where, bad(where, f"a line of {len(line):,} characters", f"keep it under {MAX_LINE:,}")
        else:
            last = not _SOLID.search(text, at)
            yield where, _strict(line, where, "put one JSON object on each line", CUT_OFF if last else "")


def _document(path: Path, text: str, start: int) -> Iterator[tuple[str, Any]]:
    """A list of entries, an object that holds one under "facts" or "data", or one entry."""
    if text[start] == "{":
        found = [*_members(text, start)]
        members = {key: at for key, at, _ in found}
        lists = [members[name] for name in WRAPPERS if name in members and text[members[name]] == "["]
        if not lists or len(members) < len(found) or members.keys() & {"prompt", "requested_rewrite", "src"}:
            yield f"{path}:1", _strict(text[start:], f"{path}:1", "mend the JSON")  # it refuses a name given twice
            return
        start = lists[0]
    line, last = 1, 0
    for i, (_, at, end) in enumerate(_members(text, start)):
        line, last = line + text.count("\n", last, at), at
        yield f"{path}[{i}]", _strict(text[at:end], f"{path}[{i}]", f"mend the JSON, in the entry at line {line}")


def _members(text: str, at: int) -> Iterator[tuple[str | None, int, int]]:
    """Name (None in a list), start and end of each member of the well-formed JSON list or object that begins at ``at``."""
    named, at = text[at] == "{", _behind_space(text, at + 1)
    while text[at] not in "]}":
        name = None
        if named:
            name, at = _LENIENT.raw_decode(text, at)
            at = _behind_space(text, _behind_space(text, at) + 1)  # the colon
        end = _LENIENT.raw_decode(text, at)[1]
        yield name, at, end
        at = _behind_space(text, end)
        at = _behind_space(text, at + (text[at] == ","))


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _strict(text: str, where: str, fix: str, unfinished: str = "") -> Any:
    """A JSON value, or the FactsError it deserves.

    Args:
        unfinished: the remedy where the text ends in the middle of a value.
    """
    try:
        return parse_json(text, nan_is_null=True)
    except json.JSONDecodeError as e:
        fix = unfinished if unfinished and _ends_within(text, e) else fix
        return bad(where, f"not JSON: {e.msg} (column {e.colno})", fix)
    except UnicodeEncodeError as e:
        return bad(where, f"holds half a character, U+{ord(e.object[e.start]):04X}", "write the character itself")
    except ValueError as e:
        return bad(where, f"not JSON: {e}", fix)


def _ends_within(text: str, e: json.JSONDecodeError) -> bool:
    """Does an object or a list end before its last bracket?"""
    if text[:1] not in ("{", "["):
        return False
    if e.msg.startswith("Unterminated string"):
        return text[-1] not in "}]"  # else a quotation mark is missing rather
    # At the end; or where a word such as true begins, or an escape, and nothing comes after it.
    return not re.search(r"[\s,:{}\[\]\"]", text[e.pos :].strip())


def _csv_rows(path: Path, text: str, chosen: Chosen) -> Iterator[tuple[str, Any]]:
    first = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(_csv_lines(path, text), delimiter=max(",;\t", key=first.count), strict=True)
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
            header = _header(cells, where, chosen)
        elif len(cells) > len(header):
            yield where, bad(where, "more cells than the header has", 'quote cells with commas: "a, b"')
        elif sum(map(len, cells)) >= MAX_LINE:
            yield where, bad(where, f"a line of {sum(map(len, cells)):,} characters", f"keep it under {MAX_LINE:,}")
        else:
            yield where, {k: _cell(k, v) for k, v in zip(header, cells, strict=False)}


def _csv_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text, newline=""), 1):
        if len(line) > 10 * MAX_LINE:  # a reader takes cells by the million
            raise bad(f"{path}:{number}", f"a line of {len(line):,} characters", f"keep it under {MAX_LINE:,}")
        if number > 2 * MAX_ENTRIES:
            raise bad(path, f"more than {number - 1:,} lines", "split it")
        yield line


def _header(cells: Sequence[str], where: str, chosen: Chosen) -> list[str]:
    if sum(map(len, cells)) >= MAX_LINE:
        raise bad(where, f"a header of more than {MAX_LINE:,} characters", f"begin with: {','.join(REQUIRED)}")
    header = [cell.strip() for cell in cells]
    names = names_of(shape_of(dict.fromkeys(header)), chosen)
    there = {*header, *(ours for ours in REQUIRED if {*header} & {*names[ours]})}
    missing = [(field, names[field][0]) for field in REQUIRED if not there & {*names[field]}]
    if len(missing) == len(REQUIRED):
        raise bad(where, "the first line is not a header", f"begin with: {','.join(REQUIRED)}")
    if missing:
        field, name = missing[0]
        fix = rename(field, header, f"add it: {name}")
        if field == "subject":
            fix += f", or {WHOLE}"
        raise bad(where, f"column '{name}' is missing", fix)
    if twice := [name for name, n in Counter(header).items() if name and n > 1]:
        raise bad(where, f"column '{twice[0]}' stands there twice", "rename one of the two")
    return header


def _cell(name: str, value: str) -> str | list[str]:
    return [part.strip() for part in value.split("|")] if name in SEVERAL and "|" in value else value
