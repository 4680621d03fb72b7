"""The command line: parse, one library call, render. Nothing heavy is imported until a command runs.

Exit codes: 0 done · 1 bug · 2 usage · 3 facts file · 4 model · 5 patch · 6 wrong base · 7 output · 8 nothing changed, or
harm refused · 9 Hub · 10 below --fail-under · 11 stopped early · 12 patches conflict · 130 Ctrl-C · 141 closed pipe.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mosectl import __version__
from mosectl.errors import FactsError, MosectlError, Notice, OutputError, StoppedEarly, UsageError
from mosectl.shown import guard_streams

app = typer.Typer(
    name="mosectl",
    help="Edit facts in open language models with orthogonal, portable, revertible patches.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 facts file, 4 model, 5 patch, 6 wrong base, 7 output, "
    "8 nothing changed, or harm refused, 9 Hub, 10 below --fail-under, 11 stopped early, 12 patches conflict, 130 Ctrl-C, "
    "141 closed pipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Model folder or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or balanced (all GPUs).")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Skip the check that the patch was made for this base.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N facts.")]
OnError = Annotated[str, typer.Option(help="Bad lines: fail, or skip them.")]
Corpus = Annotated[
    str | None,
    typer.Option(help="Text for statistics: .txt (one text a line) or .jsonl; default: a small embedded one."),
]


def output_file(text: str, option: str = "-o") -> Path:
    """A file to write; a name that ends in "/" is a folder's, which a Path would forget.

    Raises:
        OutputError: a folder is named.
    """
    try:
        folder = str(text).endswith(("/", os.sep)) or Path(text).is_dir()
    except OSError as e:  # a name too long
        raise OutputError(f"cannot write: {e.strerror}", where=str(text), fix="choose a shorter name") from e
    if folder:
        fix = f"give a file name after {option}, such as {Path(text) / 'name'}"
        raise OutputError("is a folder, not a file", where=str(text), fix=fix)
    return Path(text)


def file_option(option: str = "-o") -> dict[str, Any]:
    """What an option that names a file to write tells typer."""
    return {"parser": lambda text: output_file(text, option), "metavar": "FILE"}


FILE = file_option()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mosectl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


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
    from mosectl import report, views
    from mosectl.facts import read_facts

    found = read_facts(facts, "report", limit)
    tokens, unreadable = None, 0
    if model is not None:
        from mosectl.plan import reader
        from mosectl.positions import fit
        from mosectl.tokens import describe

        tokenizer, window = reader(model, revision)
        tokens = [describe(tokenizer, fact, chat) for fact in found.facts]
        _, long = fit(found.facts, tokenizer, window, chat)
        found = replace(found, problems=(*found.problems, *long))
        unreadable = sum(p.severity == "error" for p in long)
    if as_json:
        report.data({"facts": found.facts, "problems": found.problems, "skipped": found.skipped, "tokens": tokens})
    else:
        views.check(found, tokens)
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
    from mosectl import report, views
    from mosectl.plan import diagnose

    found = diagnose(model, revision)
    if as_json:
        report.data(found)
    else:
        views.doctor(found)
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
    from mosectl import report, views
    from mosectl.facts import read_facts

    checked = read_facts(facts, on_error, limit)
    views.problems(checked)
    from mosectl.places import new_file

    # Ours from here on: a second start is refused now, and not after its work.
    with (
        nullcontext() if dry_run else new_file(out, overwrite=overwrite, reads=(facts, model, corpus, editor)) as place
    ):
        from mosectl.editor import edit as compute
        from mosectl.files import output_errors
        from mosectl.options import options_from
        from mosectl.plan import estimate, patch_bytes, reader
        from mosectl.positions import fitted
        from mosectl.progress import Progress, beside

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
            report.data(plan) if as_json else views.estimate(plan, len(checked.facts))
            return
        kept = Progress(beside(out), resume)
        with output_errors(kept.path):
            if kept.path.exists() and not resume and not overwrite:
                fix = "give --resume to go on with it, or --overwrite to start again"
                raise OutputError("holds what an interrupted run has reached", where=str(kept.path), fix=fix)
        place.reserve(patch_bytes(model, checked.facts, options, revision=revision))
        with report.progress() as on_step, _kept(kept):
            result = compute(
                checked.facts, model, options=options, revision=revision, device=device, dtype=dtype,
                on_error=on_error, progress=kept, on_step=on_step,
            )  # fmt: skip
        result.patch.save(place.ready())
    kept.done()
    if as_json:
        edited = {"edited_layers": result.patch.options["layers"]}
        report.data({"patch": str(out), "id": result.patch.id, **edited, **_numbers(result)})
    else:
        views.edit(result, out, model)
    if result.stopped:
        from mosectl.guard import remedy

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
    from mosectl import report, views

    if patch.startswith("hf://") and model is None:  # by range requests, nothing is downloaded
        from mosectl.share import remote_record, remote_tables

        record, tensors = remote_record(patch)
        if as_json:
            report.data({**record, "tensors": tensors})
        else:
            note = "read from the file's header alone: pull it to check its id"
            report.tables(remote_tables(patch, record, tensors), [note])
        return
    from mosectl.editor_file import Editor, is_editor
    from mosectl.inspection import inspect as look

    if is_editor(patch):
        if model is not None:
            raise UsageError("--model: an editor has no effect of its own", fix="leave it out; edit checks the model")
        editor = Editor.load(patch)
        report.data({**editor.record, "id": editor.id}) if as_json else views.trained(editor)
        return
    found = look(patch, model=model, revision=revision)
    if as_json:
        report.data({**_record(found.patch), "file_bytes": found.file_bytes, "factors": found.factors})
    else:
        views.inspection(found)
    if model is not None and any(r.stability is None for r in found.factors):
        from mosectl.errors import BaseMismatch
        from mosectl.journal import read_journal

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
    from mosectl import report, views
    from mosectl.live import ask as run
    from mosectl.live import load_patches

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
    report.data(found) if as_json else views.asked(found)


def named(phase: str, on_step: Any) -> Any:
    return lambda done, total: on_step(phase, done, total)


@contextmanager
def _kept(progress: Any) -> Iterator[None]:
    """Say how an interrupted run goes on; one that has failed has nothing to go on with."""
    from mosectl import report
    from mosectl.errors import EditFailed

    try:
        yield
    except EditFailed:
        progress.done()
        raise
    except KeyboardInterrupt:
        if progress.path.exists():
            report.hint(f"{progress.path} holds the finished batches: give --resume to go on")
        raise


def _record(patch: Any) -> dict[str, Any]:
    import json

    return {"id": patch.id, **json.loads(patch.record)}


def _numbers(result: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(result).items() if k not in ("patch", "interviews")}


from mosectl import cli_bench, cli_eval, cli_share, cli_stack, cli_stats, cli_train  # noqa: E402, F401  (register their commands; need the options above)


def _shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings as a line, others as Python has them."""
    from mosectl import report

    if issubclass(category, Notice):
        report.warn("note", f": {message}")
    else:
        report.warning(message, category, *where[:2])


def _own_output() -> None:
    """Keep standard output for results: what libraries in C print there (LAPACK's messages) goes to standard error."""
    out: Any = sys.stdout
    theirs: Any = sys.__stdout__
    try:
        if out is None or out is not theirs or out.fileno() != 1:
            return
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):  # closed, or not a file
        return
    # Python's own print goes where it went.
    sys.stdout = open(kept, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115


def main() -> None:
    """Run a command; every error becomes one message and a documented exit code."""
    _own_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are cleaned up
    warnings.showwarning = _shown
    warnings.simplefilter("always", Notice)
    guard_streams()
    pressed: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        code = app(standalone_mode=False)  # typer turns Exit and Ctrl-C into a returned code
        if code == 130:
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told
        _no_more_interrupts()
        sys.exit(code or 0)
    except BaseException as e:
        # Libraries that are being imported turn Ctrl-C into errors of their own.
        code = _failed(KeyboardInterrupt() if pressed else e)
        _no_more_interrupts()
        sys.exit(code)


def _no_more_interrupts() -> None:
    """The result is out, or the interruption told: what comes is the way out, with the exit code that was said.

    Python ends itself by the same signal at the very end where it once came upon code that a library ran from a text.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})


def _drop_stdout() -> None:
    """What is still in its buffer cannot be written; Python would try again on the way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(e: BaseException) -> int:
    from mosectl import report

    if isinstance(e, SystemExit):
        return 141 if e.code == 1 else int(e.code or 0)  # 1: how rich leaves when the reader closes the pipe
    if isinstance(e, KeyboardInterrupt | typer.Abort):
        report.interrupted()
        return 130
    invalid = isinstance(e, OSError) and e.filename is None and e.errno == errno.EINVAL
    if isinstance(e, BrokenPipeError) or (sys.platform == "win32" and invalid):  # what Windows calls a closed pipe
        _drop_stdout()
        return 141
    if isinstance(e, OSError) and e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _drop_stdout()
        e = OutputError(f"cannot write: {e.strerror}", where="standard output", fix="free some space")
    if report.debugging():
        raise e
    if type(e).__name__ == "OutOfMemoryError":
        e = UsageError(
            "out of GPU memory",
            fix="try --dtype bfloat16, or --device cpu",
        )
    if hasattr(e, "format_message"):  # typer's own usage errors
        if not e.format_message():  # no arguments at all: the help was shown
            return 2
        e = UsageError(e.format_message(), fix="see --help")
    report.error(e)
    return e.exit_code if isinstance(e, MosectlError) else 1
