"""`mosectl check`, `doctor`, `edit`, `inspect`, `ask`: from facts to a patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mosectl.cli.params import FILE, Chat, Corpus, Device, Dtype, Force, Json, Limit, Model, OnError, Revision, app
from mosectl.errors import FactsError, OutputError, StoppedEarly, UsageError


@app.command()
def check(
    facts: Annotated[str, typer.Argument(help="Facts file: .jsonl, .json or .csv.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also show each fact's tokens for this model.")
    ] = None,
    revision: Revision = None,
    chat: Chat = False,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Check every line of a facts file; with --model show how it is tokenised."""
    from mosectl.facts.records import read_facts
    from mosectl.render import console, terminal

    found = read_facts(facts, "report", limit)
    tokens, unreadable = None, 0
    if model is not None:
        from mosectl.editing.plan import reader
        from mosectl.model.positions import fit
        from mosectl.model.tokens import describe

        tokenizer, window = reader(model, revision)
        tokens = [describe(tokenizer, fact, chat) for fact in found.facts]
        _, long = fit(found.facts, tokenizer, window, chat)
        found = replace(found, problems=(*found.problems, *long))
        unreadable = sum(p.severity == "error" for p in long)
    if as_json:
        console.data({"facts": found.facts, "problems": found.problems, "skipped": found.skipped, "tokens": tokens})
    else:
        terminal.check(found, tokens)
    if found.skipped or not found.facts:
        raise FactsError(
            f"{found.skipped} entries cannot be used" if found.skipped else "holds no usable fact",
            where=facts, fix="mend them, or edit with --on-error skip",
        )  # fmt: skip
    if unreadable:
        what, fix = f"{unreadable} prompts cannot be read by this model", "shorten them, or edit with --on-error skip"
        raise FactsError(what, where=facts, fix=fix)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what would be edited in a model, and whether anything stands in the way. Loads no weights."""
    from mosectl.editing.plan import diagnose
    from mosectl.render import console, terminal

    found = diagnose(model, revision)
    if as_json:
        console.data(found)
    else:
        terminal.doctor(found)
    if found.problems:
        from mosectl.errors import ModelError

        raise ModelError("cannot be edited as it is", where=model, fix=found.problems[0])


@app.command()
def edit(
    facts: Annotated[str, typer.Argument(help="Facts file: .jsonl, .json or .csv.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.", **FILE)] = Path("patch.safetensors"),
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="Solver: isospectral, mose, oft, rome, memit, rect, emmet, prune, alphaedit; with --editor horse, malmen, "
            "horse-isospectral."
        ),
    ] = "isospectral",
    editor: Annotated[
        str | None, typer.Option(help="Trained editor (mosectl train-editor), a file or hf://user/repo.")
    ] = None,
    layers: Annotated[str, typer.Option(help="auto, or layers such as 19,20,21 or 19-21.")] = "auto",
    batch_size: Annotated[
        int, typer.Option(min=0, help="Facts edited together; 1 = one after the other, 0 = all at once.")
    ] = 0,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often targets and solve alternate in a batch.")] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="steps: as many as a fact needs; gradient: one forward and backward a batch, for thousands of facts."
        ),
    ] = "steps",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A solver or target setting, e.g. --set preserve=2. Repeatable.")
    ] = None,
    corpus: Corpus = None,
    form: Annotated[
        str,
        typer.Option(
            help="Rotations in the patch: compact (low rank), dense, or auto: the smaller that loses no fact."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Chooses the prefix texts.")] = 0,
    limit: Limit = None,
    on_error: OnError = "fail",
    chat: Chat = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time, memory and size; load and write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing patch file.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last batch of an interrupted run (-o.progress).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute an edit and write it as a patch; the model itself is not changed."""
    from mosectl.facts.records import read_facts
    from mosectl.render import console, terminal

    checked = read_facts(facts, on_error, limit)
    terminal.problems(checked)
    from mosectl.storage.places import new_file

    # Ours from here on: a second start is refused now, and not after its work.
    with (
        nullcontext() if dry_run else new_file(out, overwrite=overwrite, reads=(facts, model, corpus, editor)) as place
    ):
        from mosectl.editing.edit import edit as compute
        from mosectl.editing.options import options_from
        from mosectl.editing.plan import estimate, patch_bytes, reader
        from mosectl.editing.resume import Progress, beside
        from mosectl.model.positions import fitted
        from mosectl.storage.atomic import output_errors

        options = options_from(
            settings or [],
            method=method,
            layers=layers,
            batch_size=batch_size,
            rounds=rounds,
            targets=targets,
            seed=seed,
            chat=chat,
            corpus=corpus,
            form=form,
            editor=editor,
        )
        if place is None:
            fitted(checked.facts, *reader(model, revision), chat=chat, on_error=on_error)
            plan = estimate(model, checked.facts, options, revision=revision, device=device, dtype=dtype)
            console.data(plan) if as_json else terminal.estimate(plan, len(checked.facts))
            return
        kept = Progress(beside(out), resume)
        with output_errors(kept.path):
            if kept.path.exists() and not resume and not overwrite:
                fix = "give --resume to go on with it, or --overwrite to start again"
                raise OutputError("holds what an interrupted run has reached", where=str(kept.path), fix=fix)
        place.reserve(patch_bytes(model, checked.facts, options, revision=revision))
        with console.progress() as on_step, _kept(kept):
            result = compute(
                checked.facts, model, options=options, revision=revision, device=device, dtype=dtype,
                on_error=on_error, progress=kept, on_step=on_step,
            )  # fmt: skip
        result.patch.save(place.ready())
    kept.done()
    if as_json:
        edited = {"edited_layers": result.patch.options["layers"]}
        console.data({"patch": str(out), "id": result.patch.id, **edited, **_numbers(result)})
    else:
        terminal.edit(result, out, model)
    if result.stopped:
        from mosectl.editing.guard import remedy

        fix = remedy(options.editor is not None)
        raise StoppedEarly(f"stopped early: {result.stopped}", where=str(out), fix=fix)


@app.command()
def inspect(
    patch: Annotated[str, typer.Argument(help="Patch file, or hf://user/repo; or a trained editor's file.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Compare norms and spectra on this model.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a patch holds; needs no model. With --model: its effect on the stored weights."""
    from mosectl.render import console, terminal

    if patch.startswith("hf://") and model is None:  # by range requests, nothing is downloaded
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
        terminal.inspection(found)
    if model is not None and any(r.stability is None for r in found.factors):
        from mosectl.checkpoints.journal import read_journal
        from mosectl.errors import BaseMismatch

        journal = read_journal(Path(model)) if Path(model).is_dir() else None
        there = journal is not None and found.patch.id in [p.id for p in journal.patches]
        what = "the patch is already applied here" if there else "is not the model this patch was made for"
        raise BaseMismatch(what, where=model, fix=f"give {found.patch.model}, unedited")


@app.command()
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
    from mosectl.checkpoints.live import ask as run
    from mosectl.checkpoints.live import load_patches
    from mosectl.render import console, terminal

    loaded = load_patches(patch or [])
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


@contextmanager
def _kept(progress: Any) -> Iterator[None]:
    """Say how an interrupted run goes on; one that has failed has nothing to go on with."""
    from mosectl.errors import EditFailed
    from mosectl.render import console

    try:
        yield
    except EditFailed:
        progress.done()
        raise
    except KeyboardInterrupt:
        if progress.path.exists():
            console.hint(f"{progress.path} holds the finished batches: give --resume to go on")
        raise


def _record(patch: Any) -> dict[str, Any]:
    import json

    return {"id": patch.id, **json.loads(patch.record)}


def _numbers(result: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(result).items() if k not in ("patch", "interviews")}
