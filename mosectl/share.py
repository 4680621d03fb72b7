"""Patches and trained editors on the Hugging Face Hub: push with a card made from the file, pull and check, read a patch
without a download.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mosectl.editor_file import Editor, is_editor
from mosectl.errors import PatchError, UsageError
from mosectl.grid import Grid
from mosectl.hub import hub_errors, remote_header
from mosectl.markdown import code, front_matter, inline, table
from mosectl.patch import Patch
from mosectl.patch_reader import described
from mosectl.shown import word
from mosectl.tensor_file import header_of

FILE = "patch.safetensors"
EDITOR_FILE = "editor.safetensors"
SCHEME = "hf://"
_PART = r"(?!\.\.?(?:/|$))[\w.-]+"  # of a path: not empty, "." or ".."
_REVISION = rf"refs/[\w-]+/{_PART}|{_PART}(?:/{_PART})*?"
_FILE = rf"{_PART}(?:/{_PART})*(?<=\.safetensors)"
_PLACE = re.compile(rf"hf://({_PART}/{_PART})(?:@({_REVISION}))?(?:/({_FILE}))?", re.ASCII)
_LONGEST = 250  # characters of a place: neither a file system nor the Hub takes longer names
ROWS = 100  # facts shown in a card


@dataclass(frozen=True)
class Place:
    """A patch on the Hub: hf://user/repo[@revision][/file]."""

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.file}" if self.file != FILE else "")


@dataclass(frozen=True)
class Pushed:
    """What was, or would be, uploaded."""

    place: str
    url: str  # of the commit or pull request; "" for a dry run
    id: str
    bytes: int
    card: str
    kind: str  # "patch" or "editor"


def place_of(text: str, file: str = FILE) -> Place:
    """``file`` where none is named. Raises UsageError where ``text`` is not hf://user/repo[@revision][/file.safetensors]."""
    found = _PLACE.fullmatch(text) if len(text) <= _LONGEST else None
    if not found or not is_repo(found[1]):
        fix = "write hf://user/repo, hf://user/repo@revision, or either with /FILE.safetensors"
        raise UsageError(f"'{text[:_LONGEST]}' is no place on the Hub", fix=fix)
    return Place(found[1], found[2], found[3] or file)


def is_repo(name: str) -> bool:
    """Is this user/name, as the Hub allows it?"""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(HFValidationError):
        validate_repo_id(name)
        return name.count("/") == 1
    return False


def local(path: str | Path, file: str = FILE) -> Path:
    """A patch file on this disk: the path as it is, or for hf://… the file in the Hub's cache, downloaded if need be.

    Args:
        file: what is meant where the place names none.

    Raises:
        UsageError, PatchError: no such repository, revision or file. HubError: gated, unauthorised, offline, unreachable.
    """
    if not str(path).startswith(SCHEME):
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


def remote_record(path: str) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """A patch's record and its tensors' (dtype, shape) by name, from the file's header alone (range requests).

    All is checked but the tensors' numbers: the id in it is the file's own claim until a download.

    Raises:
        as :func:`local`.
    """
    from huggingface_hub.errors import EntryNotFoundError

    place = place_of(path)
    with hub_errors(place.repo, place.revision, "patch"):
        try:
            raw, size = remote_header(place.repo, place.file, place.revision)
        except EntryNotFoundError as e:
            fix = "name it: hf://user/repo/FILE"
            raise PatchError(f"no patch '{place.file}' there", where=str(place), fix=fix) from e
    try:
        entries, metadata, start = header_of(BytesIO(raw))
        record, spans = described(entries, metadata, size - start)
    except PatchError as e:
        raise PatchError(e.what, where=f"{place}: {e.where}" if e.where else str(place), fix=e.fix) from e
    return record, {name: ("F32", span.shape) for name, span in spans.items()}


def remote_tables(place: str, record: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[Grid]:
    """The record of :func:`remote_record` as tables."""
    about = [(k, str(record.get(k) or "–")) for k in ("id", "method", "side", "model", "revision", "model_type")]
    facts = [
        (str(f.get("prompt")), str(f.get("before")), str(f.get("after")), str(f.get("status"))) for f in record["facts"]
    ]
    shapes = [(name, dtype, "×".join(map(str, shape))) for name, (dtype, shape) in sorted(tensors.items())]
    return [
        Grid(place, ("", ""), tuple(about)),
        Grid("Tensors", ("name", "dtype", ">shape"), tuple(shapes)),
        Grid(f"Facts ({len(facts)})", ("prompt", "before", "after", ""), tuple(facts)),
    ]


def push(
    file: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Upload a patch, or a trained editor, and a card made from it; the repository is made if there is none.

    Raises:
        PatchError: neither of them. UsageError: no "user/name". HubError: no token, no right to write, unreachable.
    """
    if not is_repo(repo):
        raise UsageError(f"'{repo}' is no repository", fix="write user/name")
    content = opened(file)
    size, patch = Path(file).stat().st_size, isinstance(content, Patch)
    if isinstance(content, Patch):
        name, card, about = FILE, card_of(content, repo), f"patch {content.id[:12]}, {len(content.facts)} facts"
    else:
        name, card, about = EDITOR_FILE, editor_card(content, repo), f"{content.method} editor {content.id[:12]}"
    place, kind = Place(repo, revision, name), "patch" if patch else "editor"
    if dry_run:
        return Pushed(str(place), "", content.id, size, card, kind)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="mosectl")
    with hub_errors(repo, revision, "patch"):
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        files = {name: Path(file).read_bytes(), "README.md": card.encode()}
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=f"mosectl {about}",
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(str(place), str(done.pr_url or done.commit_url), content.id, size, card, kind)


def opened(file: str | Path) -> Patch | Editor:
    """A patch or an editor, whichever the file is.

    Raises:
        PatchError.
    """
    return Editor.load(file) if is_editor(file) else Patch.load(file)


def pull(place: str, out: str | Path) -> Patch | Editor:
    """Download a patch or an editor, check all of it, and write it to ``out``. Without a name in the place the patch is
    meant, or the editor where there is no patch.

    Raises:
        as :func:`local`; PatchError also where the content is not what its id says. OutputError.
    """
    if not place.startswith(SCHEME):
        place = SCHEME + place
    try:
        file = local(place)
    except PatchError:
        if place.endswith(".safetensors"):
            raise
        try:
            file = local(place, EDITOR_FILE)
        except PatchError:
            file = local(place)  # says that there is no patch
    content = opened(file)
    content.save(out)
    return content


def card_of(patch: Patch, repo: str) -> str:
    """README.md of a patch's repository."""
    columns = ("prompt", "before", "after", ">P(new object) before", ">after", "")
    facts = [
        (f.prompt, f.before, f.after, f"{f.probability_before:.3f}", f"{f.probability_after:.3f}", f.status)
        for f in patch.facts[:ROWS]
    ]
    body = [
        f"# Knowledge edit of {inline(patch.model)}",
        "",
        f"{len(patch.facts)} facts changed by {code(patch.method)}, patch `{patch.id}`. Base: {_base(patch)}.",
        "",
        *table(columns, facts),
        *([f"\n… and {len(patch.facts) - ROWS} more."] if len(patch.facts) > ROWS else []),
        "",
        "## Measured when it was made",
        "",
        *_measured(patch.metrics),
        "",
        "## How to use it",
        "",
        f"    mosectl inspect hf://{repo}                    # without a download",
        f"    mosectl apply hf://{repo} --model {_given(patch.model)} -o edited/",
        f"    mosectl revert {patch.id[:12]} --model edited/",
        "",
        f"Made with {', '.join(inline(f'{k} {v}') for k, v in patch.versions.items())}.",
    ]
    return front_matter(patch.model, "adapter") + "\n" + "\n".join(body) + "\n"


def _base(made: Patch | Editor) -> str:
    at = f" @ {code(made.revision)}" if made.revision else ""
    return f"{inline(made.model)}{at} ({inline(made.model_type)})"


def _given(model: str) -> str:
    """A model's name as a word of a command; not one that is no plain name."""
    return word(model) if re.fullmatch(r"\w[\w ./-]{0,199}", model) else "MODEL"


def editor_card(editor: Editor, repo: str) -> str:
    """README.md of an editor's repository."""
    best = min(editor.history, key=lambda h: h["validation"])
    o = editor.options
    shapes = [(name, "×".join(map(str, editor.base[name]["shape"]))) for name in editor.modules]
    body = [
        f"# {inline(editor.method)} editor of {inline(editor.model)}",
        "",
        f"A network that computes knowledge edits of {_base(editor)}, editor `{editor.id}`.",
        "",
        *table(("layer", "shape"), shapes),
        "",
        f"Validation at step {best['step']:.0f}: new object {best['edit']:.2f} nats, in other words "
        f"{best['generalization']:.2f}, divergence elsewhere {best['locality']:.3f}. Trained on {inline(str(o['facts']))} "
        f"facts, validated on {inline(str(o['validated_on']))} others, by mosectl {inline(editor.version)}.",
        "",
        "## How to use it",
        "",
        f"    mosectl edit facts.jsonl --model {_given(editor.model)} --method {word(editor.method)} --editor hf://{repo}",
    ]
    return front_matter(editor.model) + "\n" + "\n".join(body) + "\n"


def _measured(metrics: dict[str, Any]) -> Iterator[str]:
    scores = metrics.get("scores")
    if isinstance(scores, dict):
        shares = [f"{inline(k)} {v:.1%}" for k, v in scores.items() if isinstance(v, float)]
        yield f"Protocol {code(str(scores.get('protocol')))} (greedy decoding from the bare prompt): {', '.join(shares)}."
    stability = metrics.get("stability")
    for s in stability if isinstance(stability, list) else []:
        if isinstance(s, dict) and "name" in s:
            names = ("norm_drift", "condition_drift", "spectrum_drift")
            drifts = ", ".join(f"{k} {s[k]:.1e}" for k in names if isinstance(s.get(k), int | float))
            yield f"- {code(str(s['name']))}: {drifts}"
