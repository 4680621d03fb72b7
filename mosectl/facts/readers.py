"""Facts files to rows: .jsonl (one object a line), .json (a list, also as "facts" or "data" of an object), .csv and .tsv,
on this disk or in a data set on the Hub, where there are .parquet files besides.

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
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from mosectl.errors import FactsError
from mosectl.facts.messages import MAX_LINE, SAMPLE, WHOLE, bad, rename
from mosectl.facts.shapes import Chosen, names_of, shape_of
from mosectl.facts.shapes.own import REQUIRED, SEVERAL
from mosectl.storage.data_sets import (
    CONVERTED,
    LINES,
    TABLE,
    DataSet,
    data_set_of,
    fetched,
    files_of,
    is_data_set,
    opened_remote,
    table_rows,
)
from mosectl.storage.inputs import MAX_JSON, MAX_VALUES, parse_json, read_bytes

MAX_ENTRIES = 1_000_000
STDIN = Path("-")
FIX = "check the path; facts are .jsonl, .json or .csv"
FIRST = "read the first of them: --limit N"
WRAPPERS = ("facts", "data")


def read_rows(path: str | Path, chosen: Chosen) -> tuple[str, Iterator[tuple[str, Any]]]:
    """What a facts file is called in messages, and place and row of each entry; a row that cannot be read is a FactsError.

    Args:
        path: "-" is standard input, hf://datasets/user/repo… a data set on the Hub; of tables and large files there rows
            are read as they are asked for, and each row's place names the commit.
        chosen: what fields are called, as the user says; the columns of a table have to be there.
    Raises:
        FactsError, UsageError, HubError: the file as a whole cannot be read; also by the rows.
    """
    if is_data_set(path):
        place, files = files_of(data_set_of(str(path)))
        room = _Room()
        rows = chain.from_iterable(_of_hub(file, chosen, room) for file in files)
        return str(place), _bounded(str(place), rows, FIRST)
    path = Path(path)
    data = _stdin() if path == STDIN else read_bytes(path, FactsError, FIX)
    suffix = ".csv" if path == STDIN else path.suffix.lower()
    return shown(path), _bounded(shown(path), _of_text(shown(path), data, suffix, chosen), "split it")


def shown(path: str | Path) -> str:
    """A facts file's name in messages."""
    if is_data_set(path):
        return str(path)
    return "standard input" if Path(path) == STDIN else str(Path(path))


def _bounded(name: str, rows: Iterator[tuple[str, Any]], fix: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        if number == MAX_ENTRIES:
            raise bad(name, f"more than {MAX_ENTRIES:,} entries", fix)
        yield row


def _of_text(name: str, data: bytes, suffix: str, chosen: Chosen) -> Iterator[tuple[str, Any]]:
    """The entries of a text file; a suffix that is none of ours counts where the text begins as JSON does."""
    text = _text(name, data)
    start = text.lstrip()[:1]
    if start not in ("[", "{") and suffix in (".csv", ".tsv"):
        return _csv_rows(name, text, chosen)
    if start in ("[", "{") or suffix in (".jsonl", ".json"):
        return _json_rows(name, text, suffix)
    raise bad(name, "not a facts file", "give .jsonl, .json or .csv (mosectl edit --help)")


# Data sets on the Hub.


class _Room:
    """How much more of a data set is read."""

    def __init__(self) -> None:
        self.left = MAX_JSON

    def take(self, size: int, where: str) -> None:
        self.left -= size
        if self.left < 0:
            raise bad(where, f"up to here the data set holds more than {MAX_JSON / 1e6:.0f} MB", FIRST)


def _of_hub(file: DataSet, chosen: Chosen, room: _Room) -> Iterator[tuple[str, Any]]:
    """The entries of one file of a data set: those of a large one as they are asked for."""
    if file.suffix == TABLE:
        yield from _table_rows(str(file), table_rows(file), room)
        return
    place, path = fetched(file, MAX_JSON)
    if path is not None:
        data = read_bytes(path, FactsError, FIX)
        room.take(len(data), str(place))
        yield from _of_text(str(place), data, place.suffix, chosen)
    elif place.suffix == LINES:
        with opened_remote(place) as lines:
            yield from _streamed(str(place), lines, room)
    else:
        fix = f"the Hub's own conversion, if there is one, is read row by row: {DataSet(place.repo, CONVERTED)}"
        raise bad(place, f"has more than {MAX_JSON:,} bytes", fix)


def _streamed(name: str, lines: BinaryIO, room: _Room) -> Iterator[tuple[str, Any]]:
    """One JSON object a line, of a file that is too large to be read whole."""
    number = 0
    while raw := lines.readline(4 * MAX_LINE):
        number += 1
        where = f"{name}:{number}"
        room.take(len(raw), where)
        if len(raw) == 4 * MAX_LINE:
            raise bad(where, f"a line of more than {MAX_LINE:,} characters", f"keep it under {MAX_LINE:,}")
        try:
            line = raw.decode("utf-8").strip().lstrip("\ufeff")
        except UnicodeDecodeError as e:
            yield where, bad(where, f"is not UTF-8 text (byte {e.start})", "save it as UTF-8")
            continue
        if line:
            yield where, _line(line, where)


def _table_rows(name: str, rows: Iterator[Mapping[str, Any]], room: _Room) -> Iterator[tuple[str, Any]]:
    """Rows of a table as the JSON objects that they are, by the same rules; dates become texts, bytes null."""
    for number, row in enumerate(rows):
        where = f"{name}[{number}]"
        try:
            line = json.dumps(row, ensure_ascii=False, default=lambda v: None if isinstance(v, bytes) else str(v))
        except (RecursionError, ValueError, TypeError) as e:
            yield where, bad(where, f"not a row that JSON could hold: {e}", "leave it out")
            continue
        room.take(len(line), where)
        yield where, _line(line, where)


def _line(line: str, where: str, unfinished: str = "") -> Any:
    """The value of one line, or the FactsError it deserves."""
    if len(line) >= MAX_LINE:
        return bad(where, f"a line of {len(line):,} characters", f"keep it under {MAX_LINE:,}")
    return _strict(line, where, "put one JSON object on each line", unfinished)


# Text.


def _text(path: str, data: bytes) -> str:
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


def _refuse_binary(path: str, data: bytes) -> None:
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


def _json_rows(path: str, text: str, suffix: str) -> Iterator[tuple[str, Any]]:
    start = _behind_space(text, 0)
    listed = text[start] == "["
    rest = "lines"  # what stands behind the first value
    if sum(map(text.count, ",[{")) <= MAX_VALUES:
        try:
            end = _LENIENT.raw_decode(text, start)[1]
            rest = text[end:].strip()
            if listed and rest and suffix != ".jsonl":
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


def _lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """One JSON value a line. Only a line feed ends a line: U+2028 and the like may stand in a JSON string."""
    at, number = 0, 1
    while found := _SOLID.search(text, at):
        number += text.count("\n", at, found.start())
        at = end if (end := text.find("\n", found.start())) >= 0 else len(text)
        where, line = f"{path}:{number}", text[found.start() : at].strip().lstrip("\ufeff")
        yield where, _line(line, where, "" if _SOLID.search(text, at) else CUT_OFF)


def _document(path: str, text: str, start: int) -> Iterator[tuple[str, Any]]:
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


def _csv_rows(path: str, text: str, chosen: Chosen) -> Iterator[tuple[str, Any]]:
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


def _csv_lines(path: str, text: str) -> Iterator[str]:
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
