"""Data sets on the Hugging Face Hub: hf://datasets/user/repo[@revision][/file][#split], down to files and rows of tables.

A file named in it needs nothing but the Hub's client. Which files a split has, and what a parquet file holds, the library
datasets knows (extra "datasets"); what a text file says is left to the readers of facts. Nobody's code is run.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mosectl.errors import FactsError, MosectlError, UsageError
from mosectl.storage.hub import PART, REVISION, SCHEME, hub_errors, is_repo, nearly
from mosectl.text.shown import word

PREFIX = f"{SCHEME}datasets/"
TEXT, TABLE, LINES = (".jsonl", ".json", ".csv", ".tsv"), ".parquet", ".jsonl"
_PLAIN = ("json", "csv", "parquet")  # of the library's readers
_NAMED = r"(?!\.\.?(?:/|$))[^/\\#\x00-\x1f\x7f]+"  # a part of a file's path
_FILE = rf"{_NAMED}(?:/{_NAMED})*\.(?i:jsonl|json|csv|tsv|parquet)"
_PLACE = re.compile(rf"{PREFIX}({PART}/{PART})(?:@({REVISION}))?(?:/({_FILE}))?", re.ASCII)
_LONGEST = 500  # characters of a place
_SHOWN = 10  # names in a message
_ROW = re.compile(r"(.+?)(?:\[\d+\]|:\d+)(?: edit \d+)?", re.DOTALL)
CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own conversion of public data sets
WHAT = f"{PREFIX}user/repo, with @revision, /FILE.jsonl (.json, .csv, .tsv, .parquet) or #SPLIT behind it"


@dataclass(frozen=True)
class DataSet:
    """A data set, a split or a file of it; as text: hf://datasets/user/repo[@revision][/file][#split]."""

    repo: str
    revision: str | None = None
    file: str = ""
    part: str = ""  # a split, a configuration, or configuration/split

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{at}" + (f"/{self.file}" if self.file else "") + (f"#{self.part}" * bool(self.part))

    @property
    def suffix(self) -> str:
        """Of the file, in lower case; empty where none is named."""
        return Path(self.file).suffix.lower()


def is_data_set(path: str | Path) -> bool:
    """Is this a place on the Hub rather than a file here?

    Raises:
        UsageError: it is nearly one, as HF://…, hf:/… and addresses of pages are.
    """
    if not isinstance(path, str):
        return False
    if behind := nearly(path):
        meant = f"{PREFIX}{behind.removeprefix('datasets/')}"
        fix = f"write {word(meant)}" if _PLACE.fullmatch(meant.partition("#")[0]) else f"write {WHAT}"
        raise UsageError(f"'{path[:_LONGEST]}' is no file here; on the Hub a data set is {PREFIX}…", fix=fix)
    return path.startswith(SCHEME)


def data_set_of(text: str) -> DataSet:
    """The data set that a text names; the Hub is not asked.

    Raises:
        UsageError: it names none.
    """
    address, _, part = text.partition("#")
    found = _PLACE.fullmatch(address) if len(text) <= _LONGEST else None
    if not found or not is_repo(found[1]) or not part.isprintable() or (address != text and not part):
        raise UsageError(f"'{text[:_LONGEST]}' is no data set on the Hub", fix=f"write {WHAT}")
    if found[3] and part:
        raise UsageError(f"'{text}': a file has no splits", fix=f"leave #{part} out, or the file")
    return DataSet(found[1], found[2], found[3] or "", part)


def origin(source: str) -> str:
    """The file of a data set, at its commit, that a fact's source names; empty for any other source."""
    found = _ROW.fullmatch(source) if source.startswith(PREFIX) else None
    return found[1] if found else ""


# Files.


def fetched(place: DataSet, most: int) -> tuple[DataSet, Path | None]:
    """A file of a data set: the place at its commit, and the file in the Hub's cache, downloaded if need be.

    Args:
        most: bytes; a larger file is not downloaded, and None stands for it. With -1 none is.
    Raises:
        FactsError: no such data set, revision or file. HubError: gated, unauthorised, offline or unreachable.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where: dict[str, Any] = {
        "repo_id": place.repo, "filename": place.file, "repo_type": "dataset", "revision": place.revision,
        "library_name": "mosectl",
    }  # fmt: skip
    with hub_errors(place.repo, place.revision, "data set"):
        try:
            there = hf_hub_download(**where, dry_run=True)
            if (there.file_size or 0) > most:
                return replace(place, revision=there.commit_hash), None
            file = Path(hf_hub_download(**where))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as e:
            fix = f"see which there are: https://huggingface.co/datasets/{place.repo}/tree/{place.revision or 'main'}"
            raise FactsError(f"no file '{place.file}' there", where=str(place), fix=fix) from e
    return replace(place, revision=file.parents[place.file.count("/")].name), file


@contextmanager
def opened_remote(place: DataSet) -> Iterator[Any]:
    """A file of a data set, read as it is asked for and kept nowhere.

    Raises:
        as :func:`fetched`.
    """
    from huggingface_hub import HfFileSystem

    with hub_errors(place.repo, place.revision, "data set"):
        path = f"datasets/{place.repo}@{place.revision}/{place.file}"
        with HfFileSystem().open(path, "rb", block_size=2**20) as file, io.BufferedReader(file) as buffered:
            yield buffered


def files_of(place: DataSet) -> tuple[DataSet, tuple[DataSet, ...]]:
    """A data set at its commit, with its one split or the one chosen, and the files that hold it.

    Raises:
        FactsError: no such data set, revision or split; several and none chosen; not a data set of facts.
        UsageError: the library datasets is missing. HubError: gated, unauthorised, offline or unreachable.
    """
    if place.file:
        place = fetched(place, -1)[0] if place.suffix == TABLE else place  # the others when they are read: to be cached
        return place, (place,)
    library = _library(place)
    from huggingface_hub import HfApi

    with hub_errors(place.repo, place.revision, "data set"):
        api = HfApi(library_name="mosectl")
        about = api.dataset_info(place.repo, revision=place.revision)
        if about.gated:  # anyone may see what it is about; the library says no more than that it is not found
            api.auth_check(place.repo, repo_type="dataset")
        place = replace(place, revision=str(about.sha))
    names = [file.rfilename for file in about.siblings or ()]
    _refuse_script(place, names)
    with _reading(place, _by_file(names)):
        address: dict[str, Any] = {"path": f"{PREFIX}{place.repo}", "revision": place.revision}
        configurations = [*map(str, library.get_dataset_config_names(**address))]
        configuration, split = _chosen_configuration(place, configurations)
        builder = library.load_dataset_builder(name=configuration, **address)
    found: dict[str, Sequence[str]] = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _PLAIN or not found or builder.hash != place.revision:  # another hash: left in the cache by others
        raise FactsError("holds no tables", where=str(place), fix=_by_file(names))
    split = _chosen(place, split, [*found], "split", configuration if len(configurations) > 1 else "")
    part = f"{configuration}/{split}" if len(configurations) > 1 else split
    start = f"{PREFIX}{place.repo}@{place.revision}/"
    if other := next((str(file) for file in found[split] if not str(file).startswith(start)), ""):
        raise FactsError(f"names data that lie elsewhere: {other[:_LONGEST]}", where=str(place), fix=_by_file(names))
    files = [DataSet(place.repo, place.revision, str(file).removeprefix(start)) for file in found[split]]
    if wrong := next((file for file in files if file.suffix not in (*TEXT, TABLE)), None):
        raise FactsError("is not .jsonl, .json, .csv, .tsv or .parquet", where=str(wrong), fix=_by_file(names))
    return replace(place, part=part), tuple(files)


def _chosen_configuration(place: DataSet, names: Sequence[str]) -> tuple[str, str]:
    """The configuration, and the split as far as it is chosen."""
    first, slash, second = place.part.partition("/")
    if slash or first in names:
        return _chosen(place, first, names, "configuration", ""), second
    return _chosen(place, "", names, "configuration", ""), first


def _chosen(place: DataSet, name: str, names: Sequence[str], kind: str, within: str) -> str:
    """The one that is named, or that there is.

    Raises:
        FactsError: there is none of that name, or several and none was named.
    """
    if name in names or (len(names) == 1 and not name):
        return name or names[0]
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    what = f"has no {kind} '{name}', but {listed}" if name else f"has several {kind}s: {listed}"
    example = replace(place, part=f"{within}/{names[0]}" if within else names[0]) if names else place
    raise FactsError(what, where=str(place), fix=f"choose one, such as {word(example)}")


def _refuse_script(place: DataSet, names: Sequence[str]) -> None:
    if (script := f"{place.repo.rpartition('/')[2]}.py") in names:
        other = DataSet(place.repo, CONVERTED)
        fix = f"take the Hub's own conversion, if there is one: {other}; or {_by_file(names)}"
        raise FactsError(f"is read by a script of its own, {script}, which is not run", where=str(place), fix=fix)


def _by_file(names: Sequence[str]) -> str:
    """What to do where the library cannot help: the files that may hold facts, by name."""
    found = [name for name in names if Path(name).suffix.lower() in (*TEXT, TABLE)]
    told = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return f"name a file of it, {PREFIX}user/repo/FILE: {told or 'it has none that could hold facts'}"


# Rows of tables.


def table_rows(place: DataSet) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, read group by group as they are asked for; columns of pictures and sound are not read.

    Raises:
        as :func:`files_of`.
    """
    library = _library(place)
    with _reading(place, "see that the file is whole and has the columns that it names"):
        how: dict[str, Any] = {"data_files": {"train": [str(place)]}, "split": "train", "streaming": True}
        table = library.load_dataset("parquet", **how)
        features = table.features or {}
        if len(kept := [name for name, feature in features.items() if not _is_media(feature)]) < len(features):
            table = library.load_dataset("parquet", columns=kept, **how)
        yield from table


def _is_media(feature: Any) -> bool:
    """Would it be decoded by a library for pictures, sound or films?"""
    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    if inner := getattr(feature, "feature", None):
        return _is_media(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _library(place: DataSet) -> Any:
    """The library datasets.

    Raises:
        UsageError: it is missing, or so old that it may run code of the Hub's.
    """
    fix = f"run: pip install -U 'mosectl[datasets]'; or name a file of it: {PREFIX}user/repo/FILE.jsonl"
    try:
        import datasets
    except ImportError as e:
        raise UsageError("needs the library datasets, which is not installed", where=str(place), fix=fix) from e
    version = getattr(datasets, "__version__", "a folder of that name")
    if not version[0].isdigit() or int(version.split(".")[0]) < 5:  # they take folders here for it, and 3 runs scripts
        what = f"needs the library datasets 5 or newer, here is {version}"
        raise UsageError(what, where=str(place), fix=fix)
    return datasets


@contextmanager
def _reading(place: DataSet, fix: str) -> Iterator[None]:
    """The library's many exceptions as one clear error with the next step, and nothing of what it logs and draws.

    Raises:
        HubError, FactsError.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with hub_errors(place.repo, place.revision, "data set"):
            try:
                yield
            except MosectlError:
                raise
            except Exception as e:
                if behind := _of_transport(e):
                    raise behind from e
                first = (str(e).strip() or type(e).__name__).splitlines()[0]
                raise FactsError(f"cannot be read as a table: {first}", where=str(place), fix=fix) from e
    finally:
        if bars:
            enable_progress_bars()


def _of_transport(e: BaseException | None) -> BaseException | None:
    """The error of the network or the Hub that is behind another; None where the content is at fault."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    seen: list[BaseException] = []
    while e is not None and e not in seen:
        absent = isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError)  # files that may be
        found = isinstance(e, HfHubHTTPError | LocalEntryNotFoundError | ConnectionError | TimeoutError)
        if (found and not absent) or type(e).__module__.startswith("httpx"):
            return e
        seen.append(e)
        e = e.__cause__ or e.__context__
    return None
