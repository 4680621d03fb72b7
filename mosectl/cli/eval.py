"""`mosectl eval`: the command line of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.cli.params import (
    FACTS,
    Chat,
    Device,
    Dtype,
    Force,
    Json,
    Limit,
    OnError,
    Read,
    Revision,
    claimed,
    file_option,
)
from mosectl.errors import UsageError

if TYPE_CHECKING:
    from mosectl.facts.records import Fact
    from mosectl.measure.evaluate import Evaluation
    from mosectl.measure.lm_harness import AbilityTasks
    from mosectl.storage.places import Place
    from mosectl.storage.progress import OnStep


What = Annotated[str, typer.Argument(metavar="MODEL_OR_PATCH", help="Patch file; or model folder or hub id.")]
Facts = Annotated[str, typer.Argument(help=FACTS)]
PatchModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The patch's model; default: the one the patch names.")
]
Base = Annotated[
    str | None, typer.Option(help="The unedited model of an edited one; default: found by its mosectl.json.")
]
Protocols = Annotated[
    list[str] | None,
    typer.Option("--protocol", help="generation, qa, easyedit, memit or zsre. Repeatable; default: all."),
]
Text = Annotated[
    str | None, typer.Option(help="Held-out text for perplexity: .txt or .jsonl; default: a small embedded one.")
]
Abilities = Annotated[
    str | None,
    typer.Option(
        metavar="TASKS",
        help="Tasks of lm-evaluation-harness, before and after: local (four small ones, no network), names such as "
        "rte,sst2,nq_open (downloaded), YAML files; commas between. Needs: pip install 'mosectl\\[eval]'.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Let YAML files of --abilities run Python code: !function, classes, metrics' scripts, unbounded templates. "
        "Only for files that you trust.",
    ),
]
AbilitiesLimit = Annotated[int | None, typer.Option(min=1, help="Examples a task; default: all.")]
FailUnder = Annotated[
    list[str] | None,
    typer.Option(help="Exit with 10 below it: reliability=0.95, memit.locality=0.9, abilities.TASK=0.6. Repeatable."),
]
Csv = Annotated[Path | None, typer.Option(help="Write one row a fact to this file.", **file_option("--csv"))]
ProbesCsv = Annotated[
    Path | None, typer.Option(help="Write one row a probe to this file.", **file_option("--probes-csv"))
]
Png = Annotated[Path | None, typer.Option(help="Write a picture (needs matplotlib).", **file_option("--png"))]
Html = Annotated[
    Path | None, typer.Option(help="Write a report, one file that needs nothing else.", **file_option("--html"))
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Prompts asked together; default: as many as fit.")]


def evaluate(
    what: What,
    facts: Facts,
    model: PatchModel = None,
    base: Base = None,
    protocol: Protocols = None,
    text: Text = None,
    abilities: Abilities = None,
    allow_code: AllowCode = False,
    abilities_limit: AbilitiesLimit = None,
    fail_under: FailUnder = None,
    csv: Csv = None,
    probes_csv: ProbesCsv = None,
    png: Png = None,
    html: Html = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    limit: Limit = None,
    read: Read = None,
    on_error: OnError = "fail",
    chat: Chat = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure an edit: reliability, generalization, locality, portability, fluency, perplexity, retention, abilities."""
    from mosectl.facts.choices import choices
    from mosectl.facts.records import read_facts
    from mosectl.render import console, terminal

    checked = read_facts(facts, on_error, limit, choices(read or ()))
    terminal.problems(checked)
    named = {"--csv": csv, "--probes-csv": probes_csv, "--png": png, "--html": html}
    files = {name: path for name, path in named.items() if path is not None}
    how = {
        "model": model, "base": base, "text": text, "chat": chat, "revision": revision, "device": device, "dtype": dtype,
        "batch_size": batch_size, "force": force, "on_error": on_error,
    }  # fmt: skip
    if len({path.absolute() for path in files.values()}) < len(files):
        raise UsageError(f"{' and '.join(files)} name the same file", fix="give each its own")
    with ExitStack() as stack:
        places = claimed(files, "--png", overwrite, (what, facts, model, base, text), stack)
        tasks = (abilities, abilities_limit, allow_code)
        found, judge = _measured(what, checked.facts, protocol or [], tasks, fail_under or [], how)
        _write(found, places)
    console.data(found) if as_json else terminal.evaluation(found)
    for path in files.values():
        console.hint(f"written: {path}")
    judge()


def _measured(
    what: str, facts: Sequence[Fact], protocols: Sequence[str], abilities: tuple[str | None, int | None, bool],
    fail_under: Sequence[str], how: dict[str, Any],
) -> tuple[Evaluation, Callable[[], None]]:  # fmt: skip
    """The evaluation, and the check of its thresholds, for after it has been shown."""
    from mosectl.measure.evaluate import choose_protocols, evaluate_edit
    from mosectl.measure.thresholds import check_asked, check_thresholds, parse_threshold
    from mosectl.render import console

    chosen = choose_protocols(protocols)
    with console.progress() as on_step:
        tasks = _tasks(*abilities, on_step)
        thresholds = [parse_threshold(t, chosen, tasks.names if tasks else ()) for t in fail_under]
        check_asked(facts, thresholds, what)
        found = evaluate_edit(what, facts, protocols=chosen, abilities=tasks, on_step=on_step, **how)
    return found, lambda: check_thresholds(found, thresholds)


def _tasks(names: str | None, limit: int | None, allow_code: bool, on_step: OnStep) -> AbilityTasks | None:
    if names is None:
        if limit is not None or allow_code:
            option = "--allow-code" if limit is None else "--abilities-limit"
            raise UsageError(f"{option} is for --abilities", fix="give both, or leave it out")
        return None
    from mosectl.measure.lm_harness import load_tasks

    if not (wanted := [n.strip() for n in names.split(",") if n.strip()]):
        raise UsageError("--abilities names no task", fix="write --abilities local, or the names of tasks")
    on_step("abilities: tasks", 0, 1)
    return load_tasks(wanted, limit, allow_code=allow_code)


def _write(found: Evaluation, places: dict[str, Place]) -> None:
    from mosectl.measure.evaluate import to_csv
    from mosectl.measure.probes import probes_csv
    from mosectl.render import charts
    from mosectl.render import html as webpage
    from mosectl.storage.atomic import write_bytes

    how: dict[str, Callable[[Evaluation], bytes]] = {
        "--csv": to_csv,
        "--probes-csv": lambda e: probes_csv(e.probes),
        "--png": charts.png,
        "--html": lambda e: webpage.render(e).encode(),
    }
    for option, place in places.items():
        write_bytes(place.ready(), how[option](found))
