"""`mosectl edit`: from facts to a patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.cli.params import (
    FACTS,
    FILE,
    Corpus,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    OnError,
    Read,
    Revision,
    not_thrown_away,
    resumable,
)
from mosectl.editing.methods import DEFAULT, built_in
from mosectl.errors import StoppedEarly, UsageError

if TYPE_CHECKING:
    from mosectl.editing.edit import EditResult
    from mosectl.editing.options import EditOptions
    from mosectl.editing.resume import Progress
    from mosectl.facts.records import FactsReport
    from mosectl.storage.places import Place

ONE, HOW = "One fact without a file", "How to edit"
Facts = Annotated[str | None, typer.Argument(help=f"{FACTS} Or one fact by --prompt, --subject and --target.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.", **FILE)]
Prompt = Annotated[
    str | None, typer.Option(help='What the model continues: "The Eiffel Tower is in".', rich_help_panel=ONE)
]
Subject = Annotated[str | None, typer.Option(help='What it is about: "Eiffel Tower".', rich_help_panel=ONE)]
Target = Annotated[str | None, typer.Option(help='The new object: "Rome".', rich_help_panel=ONE)]
Method = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(built_in())}, or one of another package; horse and malmen need --editor.",
        rich_help_panel=HOW,
    ),
]
TrainedEditor = Annotated[
    str | None,
    typer.Option(help="Trained editor (mosectl train-editor), a file or hf://user/repo.", rich_help_panel=HOW),
]
Layers = Annotated[str, typer.Option(help="auto, or layers such as 19,20,21 or 19-21.", rich_help_panel=HOW)]
BatchSize = Annotated[
    int,
    typer.Option(min=0, help="Facts edited together; 1 = one after the other, 0 = all at once.", rich_help_panel=HOW),
]
Rounds = Annotated[
    int | None, typer.Option(min=1, help="How often targets and solve alternate in a batch.", rich_help_panel=HOW)
]
Targets = Annotated[
    str,
    typer.Option(
        help="steps: as many as a fact needs; gradient: one forward and backward a batch, for thousands of facts.",
        rich_help_panel=HOW,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A solver or target setting, e.g. --set preserve=2. Repeatable.", rich_help_panel=HOW),
]
Form = Annotated[
    str,
    typer.Option(
        help="Rotations in the patch: compact (low rank), dense, or auto: the smaller that loses no fact.",
        rich_help_panel=HOW,
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Edit in the tokenizer's chat template alone: a prompt is a message, and the target the reply's first words. "
        "Without it: text and, by default, replies in sentences.",
    ),
]
Seed = Annotated[int, typer.Option(help="Chooses the prefix texts.", rich_help_panel=HOW)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Estimate time, memory and size; load and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing patch file.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on after the last batch of an interrupted run (-o.progress).")
]


def edit(
    model: Model,
    facts: Facts = None,
    prompt: Prompt = None,
    subject: Subject = None,
    target: Target = None,
    out: Out = Path("patch.safetensors"),
    method: Method = DEFAULT,
    editor: TrainedEditor = None,
    layers: Layers = "auto",
    batch_size: BatchSize = 0,
    rounds: Rounds = None,
    targets: Targets = "steps",
    settings: Settings = None,
    corpus: Corpus = None,
    form: Form = "auto",
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    read: Read = None,
    on_error: OnError = "fail",
    chat: Chat = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Compute an edit and write it as a patch; the model itself is not changed."""
    from mosectl.editing.missed import check_missed, write_missed
    from mosectl.render import console, terminal
    from mosectl.storage.places import new_file

    checked = _facts(facts, {"prompt": prompt, "subject": subject, "target": target}, on_error, limit, read or ())
    terminal.problems(checked)
    given = {
        "method": method, "layers": layers, "batch_size": batch_size, "rounds": rounds, "targets": targets, "seed": seed,
        "chat": chat, "corpus": corpus, "form": form, "editor": editor,
    }  # fmt: skip
    where = {"revision": revision, "device": device, "dtype": dtype}
    if dry_run:
        _beyond_the_plan(out, overwrite, resume)
        return _estimate(checked, model, _options(settings, given), where, on_error, as_json)
    reads = (facts, model, corpus, editor)
    check_missed(out, len(checked.facts), overwrite=overwrite, reads=reads)
    # Ours from here on: a second start is refused now, and not after its work.
    with new_file(out, overwrite=overwrite, reads=reads) as place:
        from mosectl.editing.resume import Progress, beside

        options = _options(settings, given)
        kept = Progress(beside(out), resume)
        if resume and not kept.path.exists():
            console.hint(f"there is no {kept.path} to go on with: begun at the beginning")
        not_thrown_away(kept.path, resume, overwrite, "holds what an interrupted run has reached")
        result = _computed(checked, model, options, where, on_error, place, kept)
        result.patch.save(place.ready())
    kept.done()
    missed = write_missed(out, result.facts, overwrite=overwrite, reads=reads)
    _tell(result, out, missed, model, options, as_json)


def _facts(
    file: str | None, one: Mapping[str, str | None], on_error: str, limit: int | None, read: Sequence[str]
) -> FactsReport:
    """The facts of a file, or the one that the options state."""
    from mosectl.facts.choices import choices
    from mosectl.facts.records import one_fact, read_facts

    said = {name: text for name, text in one.items() if text is not None}
    if file is not None and said:
        raise UsageError(f"both a facts file and --{next(iter(said))}", fix="give the file, or the one fact by options")
    if file is not None:
        return read_facts(file, on_error, limit, choices(read))
    if not said:
        raise UsageError("no facts", fix="give a facts file, - for standard input, or --prompt, --subject and --target")
    if missing := [name for name in one if name not in said]:
        raise UsageError(f"--{missing[0]} is missing", fix="one fact needs --prompt, --subject and --target")
    return one_fact(said["prompt"], said["subject"], said["target"])


def _options(settings: Sequence[str] | None, given: Mapping[str, Any]) -> EditOptions:
    from mosectl.editing.options import options_from

    return options_from(settings or [], **given)


def _beyond_the_plan(out: Path, overwrite: bool, resume: bool) -> None:
    """What a dry run does not foretell: whether the output is in the way, and what an interrupted run has done."""
    from mosectl.render import console

    if out.exists() and not overwrite:
        console.hint(f"{out} exists: without --dry-run, give --overwrite or another name")
    if resume:
        console.hint("--resume: the times are of the whole run, what is done already is not taken off")


def _estimate(
    checked: FactsReport, model: str, options: EditOptions, where: Mapping[str, Any], on_error: str, as_json: bool
) -> None:
    from mosectl.editing.diagnosis import reader
    from mosectl.editing.plan import estimate
    from mosectl.model.positions import fitted
    from mosectl.render import console, terminal

    fitted(checked.facts, *reader(model, where["revision"]), chat=options.chat, on_error=on_error)
    plan = estimate(model, checked.facts, options, **where)
    console.data(plan) if as_json else terminal.estimate(plan, len(checked.facts))


def _computed(
    checked: FactsReport, model: str, options: EditOptions, where: Mapping[str, Any], on_error: str, place: Place,
    kept: Progress,
) -> EditResult:  # fmt: skip
    from mosectl.editing.edit import edit as compute
    from mosectl.editing.plan import patch_bytes
    from mosectl.render import console

    place.reserve(patch_bytes(model, checked.facts, options, revision=where["revision"]))
    ours = resumable(kept.path, "the finished batches", "give --resume to go on", resume=kept.resume)
    with console.progress() as on_step, _failing(kept), ours:
        how: dict[str, Any] = {"options": options, "on_error": on_error, "progress": kept, "on_step": on_step, **where}
        return compute(checked.facts, model, **how)


@contextmanager
def _failing(kept: Progress) -> Iterator[None]:
    """A run that fails has nothing to go on with."""
    from mosectl.errors import EditFailed

    try:
        yield
    except EditFailed:
        kept.done()
        raise


def _tell(
    result: EditResult, out: Path, missed: Path | None, model: str, options: EditOptions, as_json: bool
) -> None:  # fmt: skip
    from mosectl.render import console, terminal
    from mosectl.text.jsonable import said

    if as_json:
        edited = {"edited_layers": result.patch.options["layers"]}
        numbers = {k: v for k, v in said(result).items() if k not in ("patch", "interviews")}
        beside = None if missed is None else str(missed)
        console.data({"patch": str(out), "id": result.patch.id, "missed": beside, **edited, **numbers})
    else:
        terminal.edit(result, out, model, missed)
    if result.stopped:
        from mosectl.editing.guard import remedy
        from mosectl.editing.methods import method

        fix = remedy(method(options.method).gentler)
        raise StoppedEarly(f"stopped early: {result.stopped}", where=str(out), fix=fix)
