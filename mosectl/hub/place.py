"""hf://user/repo[@revision][/file]: where a patch lies on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mosectl.errors import PatchError, UsageError
from mosectl.storage.hub import PART, REVISION, SCHEME, hub_errors, is_repo, nearly
from mosectl.text.shown import word

FILE = "patch.safetensors"
EDITOR_FILE = "editor.safetensors"
_FILE = rf"{PART}(?:/{PART})*(?<=\.safetensors)"
_PLACE = re.compile(rf"{SCHEME}({PART}/{PART})(?:@({REVISION}))?(?:/({_FILE}))?", re.ASCII)
_LONGEST = 250  # characters of a place: neither a file system nor the Hub takes longer names


@dataclass(frozen=True)
class Place:
    """A patch on the Hub: hf://user/repo[@revision][/file]."""

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.file}" if self.file != FILE else "")


def place_of(text: str, file: str = FILE) -> Place:
    """``file`` where none is named. Raises UsageError where ``text`` is not hf://user/repo[@revision][/file.safetensors]."""
    found = _PLACE.fullmatch(text) if len(text) <= _LONGEST else None
    if not found or not is_repo(found[1]):
        fix = "write hf://user/repo, hf://user/repo@revision, or either with /FILE.safetensors"
        raise UsageError(f"'{text[:_LONGEST]}' is no place on the Hub", fix=fix)
    return Place(found[1], found[2], found[3] or file)


def is_place(text: str | Path) -> bool:
    """Is this meant as a place on the Hub rather than a file here?

    Raises:
        UsageError: it is nearly one, as HF://…, hf:/… and addresses of pages are.
    """
    if behind := nearly(str(text)):
        meant = f"{SCHEME}{behind}"
        fix = f"write {word(meant)}" if _PLACE.fullmatch(meant) else f"write {SCHEME}user/repo"
        raise UsageError(f"'{str(text)[:_LONGEST]}' is no file here; on the Hub a patch is {SCHEME}user/repo", fix=fix)
    return str(text).startswith(SCHEME)


def local(path: str | Path, file: str = FILE) -> Path:
    """A patch file on this disk: the path as it is, or for hf://… the file in the Hub's cache, downloaded if need be.

    Args:
        file: what is meant where the place names none.

    Raises:
        UsageError, PatchError: no such repository, revision or file. HubError: gated, unauthorised, offline, unreachable.
    """
    if not is_place(path):
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = place_of(str(path), file)
    with hub_errors(place.repo, place.revision, "patch"):
        try:
            return Path(hf_hub_download(place.repo, place.file, revision=place.revision, library_name="mosectl"))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as e:
            raise PatchError(
                f"no file '{place.file}' there", where=str(place), fix="name it: hf://user/repo/FILE"
            ) from e
