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
    Read,
    Revision,
    claimed,
    file_option,
    not_thrown_away,
    resumable,
)

if TYPE_CHECKING:
    from mosectl.facts.records import Fact
    from mosectl.hypernetwork.file import Editor
    from mosectl.storage.places import Place


NETWORK, TRAINING = "The network", "Its training"
Facts = Annotated[
    str,
    typer.Argument(
        help="Facts to train on, hundreds or thousands, of a file or hf://datasets/user/repo; not those to be edited."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Editor file to write.", **FILE)]
Method = Annotated[
    str, typer.Option(help="horse, or malmen: the same without the orthogonal spread.", rich_help_panel=NETWORK)
]
Validation = Annotated[
    str | None,
    typer.Option(
        help="Facts file to validate on; without it a tenth of the others is kept for that.", rich_help_panel=TRAINING
    ),
]
Layers = Annotated[
    str, typer.Option(help="auto (the last six, at most half), or such as 19,20,21.", rich_help_panel=NETWORK)
]
Rank = Annotated[int, typer.Option(min=1, help="Of the network's blocks.", rich_help_panel=NETWORK)]
Blocks = Annotated[int, typer.Option(min=1, help="How many of them.", rich_help_panel=NETWORK)]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Facts edited together in a step: about as many as will be.", rich_help_panel=TRAINING),
]
Steps = Annotated[int, typer.Option(min=1, help="Training steps, at most.", rich_help_panel=TRAINING)]
Rate = Annotated[float, typer.Option(min=0.0, help="Adam's learning rate.", rich_help_panel=TRAINING)]
Locality = Annotated[float, typer.Option(min=0.0, help="Weight of what shall not change.", rich_help_panel=TRAINING)]
Patience = Annotated[
    int, typer.Option(min=1, help="Validations without a better one before it stops.", rich_help_panel=TRAINING)
]
Every = Annotated[
    int, typer.Option(min=1, help="Steps between validations; the state is kept at each.", rich_help_panel=TRAINING)
]
Plot = Annotated[Path | None, typer.Option(help="Draw the losses: a PNG file.", **file_option("--plot"))]
Seed = Annotated[int, typer.Option(help="Order of the facts, start of the network.", rich_help_panel=TRAINING)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last validation (-o.progress).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing editor file.")]


def train_editor(
    facts: Facts,
    model: Model,
    out: Out = Path("editor.safetensors"),
    method: Method = "horse",
    validation: Validation = None,
    layers: Layers = "auto",
    rank: Rank = 128,
    blocks: Blocks = 2,
    batch_size: BatchSize = 64,
    steps: Steps = 300,
    rate: Rate = 1e-2,
    locality: Locality = 5.0,
    patience: Patience = 6,
    every: Every = 20,
    corpus: Corpus = None,
    plot: Plot = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    read: Read = None,
    on_error: OnError = "fail",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train HORSE's or MALMEN's network on a model, for edit --method horse. Many GPUs: `accelerate launch -m mosectl …`."""
    from mosectl.facts.choices import choices
    from mosectl.facts.records import read_facts
    from mosectl.model import distributed
    from mosectl.render import console, terminal

    called = choices(read or ())
    checked = read_facts(facts, on_error, limit, called)
    terminal.problems(checked)
    unseen = read_facts(validation, on_error, read=called).facts if validation else ()
    first, state = distributed.first(), out.with_name(out.name + ".progress")
    given = {
        "method": method, "layers": layers, "rank": rank, "blocks": blocks, "batch_size": batch_size, "steps": steps,
        "rate": rate, "locality": locality, "patience": patience, "every": every, "seed": seed,
    }  # fmt: skip
    with ExitStack() as stack:
        files, reads = {"-o": out, "--plot": plot}, (facts, validation, corpus, model)
        places = claimed(files, "--plot", overwrite, reads, stack) if first else {}
        not_thrown_away(state, resume, overwrite, "holds an interrupted training")
        if resume and first:
            there = state.exists()
            console.hint(f"goes on with {state}" if there else f"no {state} to go on with: starts from the beginning")
        where = {"revision": revision, "device": distributed.process_device(device), "dtype": dtype}
        how = {"validation": unseen, "on_error": on_error, "state": state, "resume": resume}
        editor = _trained(model, checked.facts, given, corpus, where, how)
        if not first:
            return
        _write(editor, places)
    state.unlink(missing_ok=True)
    _tell(editor, out, model, as_json)


def _trained(
    model: str, facts: Sequence[Fact], given: dict[str, Any], corpus: str | None, where: dict[str, Any],
    how: dict[str, Any],
) -> Editor:  # fmt: skip
    from mosectl.facts.corpus import read_corpus
    from mosectl.hypernetwork.beforehand import TrainOptions, check, check_model
    from mosectl.hypernetwork.train import train
    from mosectl.model import distributed
    from mosectl.model.loading import load
    from mosectl.render import console, terminal
    from mosectl.storage.progress import Clock

    texts, options, first = read_corpus(corpus), TrainOptions(**given), distributed.first()
    check(options, facts, how["validation"])
    kept = resumable(
        how["state"], "the training up to its last validation", "give --resume to go on", resume=how["resume"]
    )
    with kept, console.progress(quiet=not first) as on_step:
        clock = Clock(on_step)
        with clock("load"):
            loaded = load(model, **where, check=lambda m, tok: check_model(m, tok, facts, options, texts, **how))
        with clock("training") as step:
            tell: dict[str, Any] = {"on_step": step, "on_validation": terminal.validated if first else None}
            return train(loaded, facts, options, texts, **tell, **how)


def _write(editor: Editor, places: dict[str, Place]) -> None:
    from mosectl.storage.atomic import write_bytes

    editor.save(places["-o"].ready())
    if "--plot" in places:
        from mosectl.render.charts import png_training

        write_bytes(places["--plot"].ready(), png_training(editor.history))


def _tell(editor: Editor, out: Path, model: str, as_json: bool) -> None:
    from mosectl.render import console, terminal

    if as_json:
        record = {k: v for k, v in editor.record.items() if k != "base"}  # samples of weights: in the file
        console.data({"editor": str(out), "id": editor.id, **record})
    else:
        terminal.trained(editor, out, model)
