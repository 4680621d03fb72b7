"""The commands about patches on folders and among each other, apply to export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.cli.params import FILE, Device, Dtype, Force, Json, Model, Revision, named, output_file
from mosectl.errors import ConflictError, PatchError, UsageError

if TYPE_CHECKING:
    from mosectl.patch.compose import Conflict


Folder = Annotated[str, typer.Argument(help="An edited folder.")]
AllowConflicts = Annotated[
    bool, typer.Option("--allow-conflicts", help="Go on where patches contradict each other; which one wins is open.")
]
UneditedBase = Annotated[
    str | None, typer.Option("--base", help="The unedited model, if MODEL is edited and has not kept its base tensors.")
]
KeepBase = Annotated[
    bool,
    typer.Option(
        "--keep-base/--no-keep-base", help="Keep the original tensors beside the edited ones for an exact revert."
    ),
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy unchanged weight files too, instead of hard-linking them.")]
Proof = Annotated[
    bool | None,
    typer.Option("--proof/--no-proof", help="Compare spectra before and after; default: up to a hidden size of 2048."),
]
CheckFacts = Annotated[
    bool,
    typer.Option("--check-facts", help="First ask whether the facts of all patches hold together; loads the model."),
]


def _told(found: Sequence[Conflict], allow: bool, as_json: bool) -> None:
    """Report conflicts; contradictions are an error where they are not allowed."""
    from mosectl.render import console, terminal
    from mosectl.text.shown import counted

    terminal.conflicts(found)
    if (bad := [c for c in found if c.kind != "order"]) and not allow:
        if as_json:
            console.data({"conflicts": bad})
        what = f"{counted(len(bad), 'conflict')}, nothing was written: {bad[0].what}"
        fix = "leave a patch out, or give --allow-conflicts and ask which one wins"
        raise ConflictError(what, where=bad[0].where, fix=fix)


def apply(
    patches: Annotated[list[str], typer.Argument(help="Patch files, applied in this order.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")],
    revision: Revision = None,
    base: UneditedBase = None,
    keep_base: KeepBase = True,
    copy: Copy = False,
    proof: Proof = None,
    check_facts: CheckFacts = False,
    allow_conflicts: AllowConflicts = False,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model with patches applied to a new folder; no GPU, and only changed files are rewritten."""
    from mosectl.checkpoints.apply import apply as run
    from mosectl.checkpoints.conflicts import before_applying
    from mosectl.checkpoints.live import load_patches
    from mosectl.render import console, written
    from mosectl.storage.folders import check_new_folder

    check_new_folder(out)
    loaded = load_patches(patches)
    how: dict[str, Any] = {"revision": revision, "force": force}
    with console.progress() as on_step:
        found = before_applying(loaded, model, ask=check_facts, device=device, on_step=named("ask", on_step), **how)
    _told(found, allow_conflicts, as_json)
    if check_facts and not any(c.kind == "lost" for c in found):
        console.hint("asked: no fact is lost")
    how |= {"base": base, "keep_base": keep_base, "copy": copy, "proof": proof}
    with console.progress() as on_step:
        done = run(loaded, model, out, on_step=named("apply", on_step), **how)
    if as_json:
        return console.data(done)
    written.applied(done, "Applied")
    written.after_applying(out, patches[-1])


def revert(
    what: Annotated[
        str, typer.Argument(metavar="PATCH|DIR", help="Patch file or 6 or more digits of its id; or the edited folder.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The edited folder, where a patch was given.")
    ] = None,
    patch: Annotated[str | None, typer.Option("--patch", help="The patch, where the folder was given.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of in place.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The unedited model, if the folder has not kept its base tensors.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take a patch out of an edited folder: bit for bit from the base tensors, or by Rᵀ where they are gone."""
    from mosectl.checkpoints.apply import revert as run
    from mosectl.render import console, written

    if (model is None) == (patch is None):
        raise UsageError(
            "which patch, and of which folder?", fix="mosectl revert PATCH --model DIR, or revert DIR --patch PATCH"
        )
    folder, patch = (what, str(patch)) if model is None else (model, what)
    wanted: Any = patch
    if Path(patch).exists() or not _looks_like_id(patch):
        from mosectl.hub.place import is_place, local
        from mosectl.patch.file import Patch

        if not Path(patch).is_file() and not is_place(patch):
            fix = "check the path, or give 6 or more digits of an applied patch's id (mosectl log DIR has them)"
            raise PatchError("no such patch file", where=repr(patch), fix=fix)
        wanted = Patch.load(local(patch))
    with console.progress() as on_step:
        done = run(wanted, folder, out, base=base, force=force, on_step=named("revert", on_step))
    console.data(done) if as_json else written.applied(done, "Reverted")


def log(folder: Folder, as_json: Json = False) -> None:
    """Which patches an edited folder holds, with which facts, and where their order matters."""
    from mosectl.checkpoints.audit import history, history_tables
    from mosectl.render import console

    found = history(folder)
    console.data(found) if as_json else console.tables(history_tables(found))


def verify(
    folder: Folder,
    base: Annotated[str | None, typer.Option(help="The unedited model, if it is not where the journal says.")] = None,
    as_json: Json = False,
) -> None:
    """Check an edited folder: patches, every tensor's hash, and that the patches make just these weights of the base."""
    from mosectl.checkpoints.audit import verify as run
    from mosectl.errors import ModelError
    from mosectl.render import console
    from mosectl.text.table import Grid

    with console.progress() as on_step:
        checks = run(folder, base=base, on_step=named("verify", on_step))
    rows = tuple((c.what, "not checked" if c.ok is None else "ok" if c.ok else "WRONG", c.note) for c in checks)
    console.data(checks) if as_json else console.tables([Grid(f"Checks of {folder}", ("what", "", "note"), rows)])
    if wrong := [c for c in checks if c.ok is False]:
        fix = "start again from the base model, or revert to it"
        raise ModelError(
            f"{len(wrong)} of {len(checks)} checks failed: {wrong[0].what}: {wrong[0].note}", where=folder, fix=fix
        )


def blame(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    folder: Folder,
    base: Annotated[str | None, typer.Option(help="The unedited model, if its tensors were not kept.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Which patch of an edited folder moved the answer to a prompt."""
    from mosectl.checkpoints.audit import blame as run
    from mosectl.render import console
    from mosectl.text.shown import answer_cell
    from mosectl.text.table import Grid

    if not Path(folder).exists() and Path(prompt).is_dir():
        raise UsageError(f"'{prompt}' is a folder, not a prompt", fix="mosectl blame PROMPT DIR")
    with console.progress() as on_step:
        ids, (found,) = run([prompt], folder, base=base, device=device, dtype=dtype, on_step=named("blame", on_step))
    steps = zip(["the base", *(f"+ {i[:12]}" for i in ids)], found.answers, strict=True)
    moved = ["", *("moved it" if i in found.moved_by else "" for i in ids)]
    rows = tuple((step, answer_cell(said), mark) for (step, said), mark in zip(steps, moved, strict=True))
    grid = Grid(f"Answers to '{prompt}'", ("with", "answer", ""), rows)
    console.data({"patches": ids, **vars(found)}) if as_json else console.tables([grid])


def merge(
    patches: Annotated[list[str], typer.Argument(help="Patch files, in the order they would be applied.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.", **FILE)],
    allow_conflicts: AllowConflicts = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing patch file.")] = False,
    as_json: Json = False,
) -> None:
    """Make one patch of several; it does what they do in this order and keeps their records."""
    from mosectl.checkpoints.live import load_patches
    from mosectl.patch.compose import conflicts
    from mosectl.patch.compose import merge as run
    from mosectl.render import console
    from mosectl.storage.places import new_file

    with new_file(out, overwrite=overwrite, reads=patches) as place:
        loaded = load_patches(patches)
        place.reserve(sum(c.nbytes for p in loaded for c in p.changes.values()))  # no more than all of them together
        merged, found = run(loaded), conflicts(loaded)
        _told(found, allow_conflicts, as_json)
        merged.save(place.ready())
    if as_json:
        console.data({"patch": str(out), "id": merged.id, "facts": len(merged.facts), "conflicts": found})
    else:
        console.hint(f"patch {merged.id[:12]} → {out} ({console.size(out.stat().st_size)}), {len(merged.facts)} facts")


def diff(
    first: Annotated[str, typer.Argument(help="Patch file.")],
    second: Annotated[str, typer.Argument(help="Patch file.")],
    as_json: Json = False,
) -> None:
    """Compare two patches: facts, conflicts, and how far their changes of each weight lie apart."""
    from mosectl.checkpoints.live import load_patches
    from mosectl.patch.compose import diff as run
    from mosectl.patch.compose import difference_tables
    from mosectl.render import console

    found = run(*load_patches([first, second]))
    console.data(found) if as_json else console.tables(difference_tables(found))


def export(
    patches: Annotated[list[str], typer.Argument(help="Patch files, in this order.")],
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder (lora, merged) or file (gguf-lora) to write.")],
    to: Annotated[str, typer.Option(help="lora (PEFT, vLLM), gguf-lora (llama.cpp), merged (a checkpoint).")] = "lora",
    revision: Revision = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the adapter down to this rank.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the adapter in bfloat16.")] = False,
    ollama: Annotated[
        str | None,
        typer.Option(
            metavar="FROM",
            help="With gguf-lora: write a Modelfile too, for this .gguf file or model of Ollama's; by itself where --model "
            "is a .gguf file.",
        ),
    ] = None,
    allow_conflicts: AllowConflicts = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write patches for serving: one LoRA for the whole stack, or a checkpoint."""
    import torch

    from mosectl.checkpoints.export import export as run
    from mosectl.checkpoints.live import load_patches
    from mosectl.patch.compose import conflicts
    from mosectl.render import console, written

    if to == "merged" and (rank or half):
        raise UsageError("--rank and --half are for adapters", fix="leave them out with --to merged")
    if ollama is not None and (to != "gguf-lora" or not ollama):
        raise UsageError("--ollama FROM goes with --to gguf-lora", fix="give both, or leave --ollama out")
    target = output_file(out) if to == "gguf-lora" else Path(out)
    loaded, dtype = load_patches(patches), torch.bfloat16 if half else torch.float32
    _told(conflicts(loaded), allow_conflicts, as_json)
    with console.progress() as on_step:
        done = run(
            loaded,
            model,
            target,
            to,
            revision=revision,
            rank=rank,
            dtype=dtype,
            ollama=ollama,
            force=force,
            on_step=named("export", on_step),
        )
    console.data(done) if as_json else written.exported(done)


def _looks_like_id(text: str) -> bool:
    return len(text) >= 6 and all(c in "0123456789abcdef" for c in text)
