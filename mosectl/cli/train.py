"""`mosectl train-editor`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.cli.params import (
    FILE,
    Corpus,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    OnError,
    Revision,
    file_option,
    named,
)
from mosectl.errors import OutputError

if TYPE_CHECKING:
    from mosectl.storage.places import Place


def train_editor(
    facts: Annotated[str, typer.Argument(help="Facts to train on, hundreds or thousands; not those to be edited.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Editor file to write.", **FILE)] = Path(
        "editor.safetensors"
    ),
    method: Annotated[str, typer.Option(help="horse, or malmen: the same without the orthogonal spread.")] = "horse",
    validation: Annotated[
        str | None, typer.Option(help="Facts file to validate on; without it a tenth of the others is kept for that.")
    ] = None,
    layers: Annotated[str, typer.Option(help="auto (the last six, at most half), or such as 19,20,21.")] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="Of the network's blocks.")] = 128,
    blocks: Annotated[int, typer.Option(min=1, help="How many of them.")] = 2,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Facts edited together in a step: about as many as will be.")
    ] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, at most.")] = 300,
    rate: Annotated[float, typer.Option(min=0.0, help="Adam's learning rate.")] = 1e-2,
    locality: Annotated[float, typer.Option(min=0.0, help="Weight of what shall not change.")] = 5.0,
    patience: Annotated[int, typer.Option(min=1, help="Validations without a better one before it stops.")] = 6,
    every: Annotated[int, typer.Option(min=1, help="Steps between validations; the state is kept at each.")] = 20,
    corpus: Corpus = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the losses: a PNG file.", **file_option("--plot"))] = None,
    seed: Annotated[int, typer.Option(help="Order of the facts, start of the network.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    on_error: OnError = "fail",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last validation (-o.progress).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing editor file.")] = False,
    as_json: Json = False,
) -> None:
    """Train HORSE's or MALMEN's network on a model, for edit --method horse. Many GPUs: accelerate launch -m mosectl …"""
    from mosectl.facts.records import read_facts
    from mosectl.model import distributed
    from mosectl.render import console, terminal
    from mosectl.storage.atomic import output_errors, write_bytes

    checked = read_facts(facts, on_error, limit)
    terminal.problems(checked)
    unseen = read_facts(validation, on_error).facts if validation else ()
    first, state = distributed.first(), out.with_name(out.name + ".progress")
    with ExitStack() as stack:
        places = _places(out, plot, overwrite, (facts, validation, corpus, model), stack) if first else {}
        with output_errors(state):
            if state.exists() and not resume and not overwrite:
                fix = "give --resume to go on with it, or --overwrite to start again"
                raise OutputError("holds an interrupted training", where=str(state), fix=fix)
        from mosectl.facts.corpus import read_corpus
        from mosectl.hypernetwork.train import TrainOptions, check, train
        from mosectl.model.loading import load

        texts = read_corpus(corpus)
        options = TrainOptions(
            method=method, layers=layers, rank=rank, blocks=blocks, batch_size=batch_size, steps=steps, rate=rate,
            locality=locality, patience=patience, every=every, seed=seed,
        )  # fmt: skip
        check(options, checked.facts, unseen)
        if resume and first:
            console.hint(
                f"goes on with {state}" if state.exists() else f"no {state} to go on with: starts from the beginning"
            )
        try:
            with console.progress(quiet=not first) as on_step:
                loaded = load(model, revision=revision, device=distributed.process_device(device), dtype=dtype)
                editor = train(
                    loaded, checked.facts, options, texts, validation=unseen, on_error=on_error, state=state, resume=resume,
                    on_step=named("training", on_step), on_validation=terminal.validated if first else None,
                )  # fmt: skip
        except KeyboardInterrupt:
            if state.exists():
                console.hint(f"{state} holds the training up to its last validation: give --resume to go on")
            raise
        if not first:
            return
        editor.save(places["-o"].ready())
        if plot:
            from mosectl.render.charts import png_training

            write_bytes(places["--plot"].ready(), png_training(editor.history))
    state.unlink(missing_ok=True)
    if as_json:
        record = {k: v for k, v in editor.record.items() if k != "base"}  # samples of weights: in the file
        console.data({"editor": str(out), "id": editor.id, **record})
    else:
        terminal.trained(editor, out, model)


def _places(
    out: Path, plot: Path | None, overwrite: bool, reads: Sequence[str | None], stack: ExitStack
) -> dict[str, Place]:
    """Where to write the editor and the picture, ours from here on."""
    from mosectl.storage.places import new_file

    if plot:
        from mosectl.render.charts import check_matplotlib

        check_matplotlib("--plot")
    files = {"-o": out, "--plot": plot}
    how: dict[str, Any] = {"overwrite": overwrite, "reads": reads}
    return {o: stack.enter_context(new_file(p, option=o, **how)) for o, p in files.items() if p}
