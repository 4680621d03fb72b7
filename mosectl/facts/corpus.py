"""Texts for statistics and prefix contexts: the embedded corpus, or a file of the user's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mosectl.errors import UsageError
from mosectl.storage import schema
from mosectl.storage.inputs import parse_json, read_bytes

_ROW = schema.record({"text": schema.text}, others=schema.anything)  # of a .jsonl file
MAX_TOKENS = 200_000
MAX_CORPUS = 256_000_000  # bytes of a file
MAX_LINE = 10_000_000  # characters of one text


@dataclass(frozen=True)
class Corpus:
    """Texts for statistics and for prefix contexts."""

    name: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash of all texts."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


def read_corpus(path: str | Path | None) -> Corpus:
    """The embedded corpus, a text file (one text a line) or a .jsonl file with a "text" field.

    Raises:
        UsageError: the file is missing, too large, not UTF-8, or holds no text; with its line where there is one.
    """
    if path is None:
        text = resources.files("mosectl").joinpath("data/corpus.txt").read_text("utf-8")
        return Corpus("embedded", tuple(line for line in text.splitlines() if line.strip()))
    path = Path(path)
    try:
        data = read_bytes(path, UsageError, "give a text file, of which some 200,000 tokens are enough", MAX_CORPUS)
    except UsageError as e:
        raise UsageError(f"cannot read the corpus: {e.what}", where=e.where, fix=e.fix) from e
    fix = 'give UTF-8 text, or .jsonl with a "text" field'
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        where = f"{path}:{data[: e.start].count(10) + 1}"
        raise UsageError(f"not a corpus: not UTF-8 text (byte {e.start})", where=where, fix=fix) from e
    if (at := data.find(b"\0")) >= 0:
        where = f"{path}:{data[:at].count(10) + 1}"
        raise UsageError(f"not a corpus: a binary file (byte {at} is 0)", where=where, fix=fix)
    texts = _jsonl(path, text, fix) if path.suffix == ".jsonl" else [x for x in text.splitlines() if x.strip()]
    if not any(map(str.strip, texts)):
        raise UsageError("the corpus holds no text", where=str(path), fix="give a file with one text a line")
    if len(longest := max(texts, key=len)) > MAX_LINE:
        what = f"a text of {len(longest):,} characters, '{longest[:30]}…'"
        raise UsageError(what, where=str(path), fix="give one text a line: an article, a chapter")
    return Corpus(path.name, tuple(texts))


def _jsonl(path: Path, text: str, fix: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 and the like may stand in a JSON string
        if line.strip():
            try:
                row = parse_json(line)
                _ROW(row)
            except ValueError as e:
                raise UsageError(f"not a corpus: {e}", where=f"{path}:{number}", fix=fix) from e
            texts.append(row["text"])
    return texts
