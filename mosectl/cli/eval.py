"""`mosectl eval`: the command line of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosectl.cli.params import FACTS, Chat, Device, Dtype, Force, Json, Limit, OnError, Revision, file_option
from mosectl.errors import UsageError

if TYPE_CHECKING:
    from mosectl.measure.evaluate import Evaluation, OnStep
    from mosectl.measure.lm_harness import AbilityTasks
    from mosectl.storage.places import Place


def evaluate(
    what: Annotated[str, typer.Argument(metavar="MODEL_OR_PATCH", help="Patch file; or model folder or hub id.")],
    facts: Annotated[str, typer.Argument(help=FACTS)],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The patch's model; default: the one the patch names.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The unedited model of an edited one; default: found by its mosectl.json.")
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="generation, easyedit, memit or zsre. Repeatable; default: all.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text for perplexity: .txt or .jsonl; default: a small embedded one.")
    ] = None,
    abilities: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, before and after: local (four small ones, no network), names such as "
            "rte,sst2,nq_open (downloaded), YAML files; commas between. Needs: pip install 'mosectl\\[eval]'.",
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Let YAML files of --abilities run Python code: !function, classes, metrics' scripts, unbounded templates. "
            "Only for files that you trust.",
        ),
    ] = False,
    abilities_limit: Annotated[int | None, typer.Option(min=1, help="Examples a task; default: all.")] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 10 below it: reliability=0.95, memit.locality=0.9, abilities.TASK=0.6. Repeatable."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row a fact to this file.", **file_option("--csv"))] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a picture (needs matplotlib).", **file_option("--png"))
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report, one file that needs nothing else.", **file_option("--html"))
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts asked together.")] = 64,
    limit: Limit = None,
    on_error: OnError = "fail",
    chat: Chat = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure an edit: reliability, generalization, locality, portability, fluency, perplexity, retention, abilities."""
    from mosectl.facts.records import read_facts
    from mosectl.render import console, terminal

    checked = read_facts(facts, on_error, limit)
    terminal.problems(checked)
    files = {name: path for name, path in (("--csv", csv), ("--png", png), ("--html", html)) if path is not None}
    with ExitStack() as stack:
        places = _places(files, overwrite, (what, facts, model, base, text), stack)
        from mosectl.measure.evaluate import choose_protocols, evaluate_edit
        from mosectl.measure.thresholds import check_asked, check_thresholds, parse_threshold

        chosen = choose_protocols(protocol or [])
        with console.progress() as on_step:
            tasks = _tasks(abilities, abilities_limit, allow_code, on_step)
            thresholds = [parse_threshold(t, chosen, tasks.names if tasks else ()) for t in fail_under or []]
            check_asked(checked.facts, thresholds, what)
            found = evaluate_edit(
                what,
                checked.facts,
                model=model,
                base=base,
                text=text,
                protocols=chosen,
                abilities=tasks,
                chat=chat,
                revision=revision,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                force=force,
                on_error=on_error,
                on_step=on_step,
            )
        _write(found, places)
    console.data(found) if as_json else terminal.evaluation(found)
    for path in files.values():
        console.hint(f"written: {path}")
    check_thresholds(found, thresholds)


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


def _places(files: dict[str, Path], overwrite: bool, reads: Sequence[str | None], stack: ExitStack) -> dict[str, Place]:
    """Where to write each, ours from here on; what stands in the way is found out before the work, not after it."""
    from mosectl.storage.places import new_file

    if len({path.absolute() for path in files.values()}) < len(files):
        raise UsageError(f"{' and '.join(files)} name the same file", fix="give each its own")
    if "--png" in files:
        from mosectl.render.charts import check_matplotlib

        check_matplotlib()
    how: dict[str, Any] = {"overwrite": overwrite, "reads": reads}
    return {o: stack.enter_context(new_file(p, option=o, **how)) for o, p in files.items()}


def _write(found: Evaluation, places: dict[str, Place]) -> None:
    from mosectl.measure.evaluate import to_csv
    from mosectl.render import charts
    from mosectl.render import html as webpage
    from mosectl.storage.atomic import write_bytes

    how = {"--csv": to_csv, "--png": charts.png, "--html": lambda e: webpage.render(e).encode()}
    for option, place in places.items():
        write_bytes(place.ready(), how[option](found))
