"""push and pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mosectl.cli.params import FILE, Json, Revision
from mosectl.text.shown import word


def push(
    patch: Annotated[str, typer.Argument(help="Patch file, or trained editor.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub, user/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
    revision: Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a patch or a trained editor, with a card. The token is huggingface_hub's own (hf auth login, HF_TOKEN)."""
    from mosectl.hub.patches import push as run
    from mosectl.render import console

    done = run(patch, repo, private=private, create_pr=create_pr, revision=revision, dry_run=dry_run)
    if as_json:
        console.data(done)
    elif dry_run:
        console.text(done.card)
        console.hint(f"would be sent to {done.place}: the {done.kind} ({console.size(done.bytes)}) and this card")
    else:
        console.text(done.url)
        console.hint(
            f"{done.kind} {done.id[:12]} → {done.place}   |   mosectl pull {word(done.place)} -o {done.kind}.safetensors"
        )


def pull(
    place: Annotated[
        str, typer.Argument(help="hf://user/repo, hf://user/repo@revision, or either with /file.safetensors.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.", **FILE)] = Path("patch.safetensors"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing patch file.")] = False,
    as_json: Json = False,
) -> None:
    """Download a patch (or a trained editor) and check all of it."""
    from mosectl.hub.patches import pull as run
    from mosectl.patch.file import Patch
    from mosectl.render import console
    from mosectl.storage.places import new_file

    with new_file(out, overwrite=overwrite) as new:
        found = run(place, new.ready())
    kind, holds = ("patch", len(found.facts)) if isinstance(found, Patch) else ("editor", found.method)
    if as_json:
        name = "facts" if kind == "patch" else "method"
        console.data({kind: str(out), "id": found.id, name: holds, "model": found.model})
    else:
        what = f"{holds} facts" if kind == "patch" else f"{holds} editor"
        console.hint(f"{kind} {found.id[:12]} → {out}, {what} of {found.model}; its content is what its id says")
