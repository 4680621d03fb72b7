"""Patches and trained editors on the Hugging Face Hub: push with a card made from the file, pull and check, read a patch
without a download.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mosectl.errors import PatchError, UsageError
from mosectl.hub.cards import card_of, editor_card
from mosectl.hub.place import EDITOR_FILE, FILE, Place, local, place_of
from mosectl.hypernetwork.file import Editor, is_editor
from mosectl.patch.file import Patch
from mosectl.patch.reader import described
from mosectl.storage.hub import SCHEME, hub_errors, is_repo, remote_header
from mosectl.storage.tensor_file import header_of
from mosectl.text.table import Grid


@dataclass(frozen=True)
class Pushed:
    """What was, or would be, uploaded."""

    place: str
    url: str  # of the commit or pull request; "" for a dry run
    id: str
    bytes: int
    card: str
    kind: str  # "patch" or "editor"


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
