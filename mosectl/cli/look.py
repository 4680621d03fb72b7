"""`mosectl check`, `doctor`, `inspect`, `ask`: looking at facts, models, patches and answers; nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mosectl.cli.params import FACTS, Chat, Device, Dtype, Force, Json, Limit, Model, Read, Revision
from mosectl.errors import FactsError, UsageError


def check(
    facts: Annotated[str, typer.Argument(help=FACTS)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also show how this model tokenises each fact: where the subject stands in the prompt, and the target.",
        ),
    ] = None,
    revision: Revision = None,
    chat: Chat = False,
    limit: Limit = None,
    read: Read = None,
    as_json: Json = False,
) -> None:
    """Check every line of a facts file; with --model show how it is tokenised."""
    from mosectl.facts.choices import choices
    from mosectl.facts.readers import shown
    from mosectl.facts.records import read_facts
    from mosectl.render import console, terminal
    from mosectl.text.shown import counted

    found = read_facts(facts, "report", limit, choices(read or ()))
    tokens, unreadable = None, 0
    if model is not None:
        from mosectl.editing.diagnosis import read_through
        from mosectl.facts.records import Problem
        from mosectl.model.positions import fit
        from mosectl.model.tokens import describe

        tokenizer, window, refused = read_through(model, revision)
        tokens = [describe(tokenizer, fact, chat) for fact in found.facts]
        _, long = fit(found.facts, tokenizer, window, chat)
        why = (
            [Problem(model, f"edit will refuse this model: {refused.what}", refused.fix, "warning")] if refused else []
        )
        found = replace(found, problems=(*why, *found.problems, *long))
        unreadable = sum(p.severity == "error" for p in long)
    if as_json:
        console.data({**vars(found), "tokens": tokens})
    else:
        terminal.check(found, tokens)
    if found.skipped or not found.facts:
        raise FactsError(
            f"{counted(found.skipped, 'entry', 'entries')} cannot be used" if found.skipped else "holds no usable fact",
            where=shown(facts), fix="mend them, or edit with --on-error skip",
        )  # fmt: skip
    if unreadable:
        what, fix = f"{unreadable} prompts cannot be read by this model", "shorten them, or edit with --on-error skip"
        raise FactsError(what, where=shown(facts), fix=fix)


def doctor(
    model: Annotated[str, typer.Argument(help="Model folder, .gguf file or hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what would be edited in a model, and what stands in the way; no weights (what an edit takes: edit --dry-run)."""
    from mosectl.editing.diagnosis import diagnose
    from mosectl.render import console, terminal

    found = diagnose(model, revision)
    if as_json:
        console.data(found)
    else:
        terminal.doctor(found, model)
    if found.problems:
        from mosectl.errors import ModelError

        raise ModelError("cannot be edited as it is", where=model, fix=found.problems[0])


def inspect(
    patch: Annotated[str, typer.Argument(help="Patch file, or hf://user/repo; or a trained editor's file.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Compare norms and spectra on this model.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a patch holds; needs no model. With --model: its effect on the stored weights."""
    from mosectl.hub.place import is_place
    from mosectl.render import console, inspection, terminal

    if is_place(patch) and model is None:  # by range requests, nothing is downloaded
        from mosectl.hub.patches import remote_record, remote_tables

        record, tensors = remote_record(patch)
        if as_json:
            console.data({**record, "tensors": tensors})
        else:
            note = "read from the file's header alone: pull it to check its id"
            console.tables(remote_tables(patch, record, tensors), [note])
        return
    from mosectl.checkpoints.inspection import inspect as look
    from mosectl.hypernetwork.file import Editor, is_editor

    if is_editor(patch):
        if model is not None:
            raise UsageError("--model: an editor has no effect of its own", fix="leave it out; edit checks the model")
        editor = Editor.load(patch)
        console.data({**editor.record, "id": editor.id}) if as_json else terminal.trained(editor)
        return
    found = look(patch, model=model, revision=revision)
    if as_json:
        console.data({**_record(found.patch), "file_bytes": found.file_bytes, "factors": found.factors})
    else:
        inspection.inspection(found)
    if model is not None and any(r.stability is None for r in found.factors):
        from mosectl.checkpoints.journal import read_journal
        from mosectl.errors import BaseMismatch

        journal = read_journal(Path(model)) if Path(model).is_dir() else None
        there = journal is not None and found.patch.id in [p.id for p in journal.patches]
        what = "the patch is already applied here" if there else "is not the model this patch was made for"
        raise BaseMismatch(what, where=model, fix=f"give {found.patch.model}, unedited")


def ask(
    prompts: Annotated[list[str], typer.Argument(help="Prompts to continue.")],
    model: Model,
    patch: Annotated[
        list[str] | None, typer.Option("--patch", "-p", help="Show the answers with this patch too. Repeatable.")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: Chat = False,
    tokens: Annotated[int, typer.Option(min=1, max=50, help="Longest continuation, in tokens.")] = 20,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show greedy continuations, before and after patches."""
    from mosectl.checkpoints.conflicts import before_applying
    from mosectl.checkpoints.live import ask as run
    from mosectl.checkpoints.live import load_patches
    from mosectl.patch.compose import conflicts
    from mosectl.render import console, terminal

    loaded = load_patches(patch or [])
    if loaded:  # as apply and export tell them; by force a folder's own patches may be out of order
        terminal.conflicts(conflicts(loaded) if force else before_applying(loaded, model, revision=revision))
    found = run(
        prompts,
        model,
        loaded,
        revision=revision,
        device=device,
        dtype=dtype,
        chat=chat,
        max_new_tokens=tokens,
        force=force,
    )
    console.data(found) if as_json else terminal.asked(found)


def _record(patch: Any) -> dict[str, Any]:
    import json

    return {"id": patch.id, **json.loads(patch.record)}
