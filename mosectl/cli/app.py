"""The typer application: registers every command in its panel, and does no more. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mosectl._version import __version__
from mosectl.cli import bench, edit, eval, hub, look, report, stack, stats, train
from mosectl.errors import EXIT_CODES


def _flags_without_type(params: list[Any]) -> list[Any]:
    """A flag takes nothing: typer shows <bool> behind each otherwise."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help page shows flags without a type."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: D102
        return _flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """All commands; the same of its own help page."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: D102
        return _flags_without_type(super().get_params(ctx))


app = typer.Typer(
    name="mosectl",
    cls=Group,
    help="Edit facts in open language models with orthogonal, portable, revertible patches.",
    epilog=f"Exit codes: {', '.join(f'{code} {short}' for code, (short, _) in EXIT_CODES.items())}.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


# In the order of the help page.
PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Edit": {"edit": edit.edit, "check": look.check, "doctor": look.doctor, "inspect": look.inspect, "ask": look.ask},
    "Patches on a model": {
        "apply": stack.apply, "revert": stack.revert, "log": stack.log, "verify": stack.verify, "blame": stack.blame,
        "merge": stack.merge, "diff": stack.diff,
    },
    "Share and serve": {"push": hub.push, "pull": hub.pull, "export": stack.export},
    "Measure": {"eval": eval.evaluate, "bench": bench.bench, "report": report.report},
    "Prepare": {"stats": stats.stats, "sample": stats.sample, "train-editor": train.train_editor},
}  # fmt: skip
for _panel, _commands in PANELS.items():
    for _name, _run in _commands.items():
        app.command(_name, cls=Command, rich_help_panel=_panel)(_run)


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
