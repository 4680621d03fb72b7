"""Write the reference pages that come from the code: commands, settings, exit codes.

python docs/generate.py             # writes docs/reference/{commands,settings,exit-codes}.md
python docs/generate.py --check     # writes nothing; exit code 1 where a page is not what the code says
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import tokenize
import typing
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import typer

# All of mosectl that is read here: where modules move, only this block changes.
from mosectl import errors
from mosectl.cli import app as cli
from mosectl.editing import methods, options, settings, targets

APP = cli.app
METHODS, method = methods.built_in(), methods.method
EditOptions, default_options, options_from = options.EditOptions, options.default_options, options.options_from
TargetOptions, WORDS = targets.TargetOptions, settings.WORDS

REFERENCE = Path(__file__).parent / "reference"
WRITTEN = "<!-- Written by docs/generate.py from the code. Change the code, then run: python docs/generate.py -->\n"
NONE = "–"


# Markdown


def cell(text: object) -> str:
    """Text as one cell of a table: no line breaks, no column ends, no HTML, no markup of rich's."""
    flat = " ".join(str(text).split()).replace("\\[", "[")
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def code(text: object) -> str:
    """A code span that may hold column ends."""
    flat = str(text)
    return f"<code>{cell(flat)}</code>" if any(c in flat for c in "|<>`") else f"`{flat}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def number(value: object) -> str:
    if value is None:
        return "auto"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


# commands.md


def commands_page() -> str:
    root: Any = typer.main.get_command(APP)
    parts = [
        WRITTEN,
        "# Commands\n",
        f"{root.help}\n",
        "Results go to standard output, progress and errors to standard error. `--json` prints one JSON document for\n"
        "programs. [Exit codes](exit-codes.md) tell what went wrong. `mosectl COMMAND --help` shows the same text.\n",
        options_table([p for p in root.params if not is_argument(p)]),
    ]
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in leaves(root, "mosectl"):
        panels.setdefault(text_of(getattr(command, "rich_help_panel", None)) or "Commands", []).append((name, command))
    if set(panels) != {"Commands"}:
        parts.append("\n".join(f"- **{panel}**: {listed(found)}" for panel, found in panels.items()) + "\n")
    else:
        parts.append(f"{listed(panels['Commands'])}\n")
    for panel, found in panels.items():
        parts.append(f"## {panel}\n")
        parts += [command_part(name, command) for name, command in found]
    return "\n".join(parts)


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below a group that are shown."""
    for own, child in command.commands.items():
        if getattr(child, "commands", None):
            yield from leaves(child, f"{name} {own}")
        elif not child.hidden:
            yield f"{name} {own}", child


def listed(found: Sequence[tuple[str, Any]]) -> str:
    return " · ".join(f"[{name.split(' ', 1)[1]}](#{name.replace(' ', '-')})" for name, _ in found)


def command_part(name: str, command: Any) -> str:
    arguments = [p for p in command.params if is_argument(p)]
    kinds = value_kinds(command.callback)
    usage = " ".join([name, *(placeholder(p) for p in arguments), "[OPTIONS]"])
    parts = [f"### {name}\n", f"{cell(command.help)}\n", f"    {usage}\n"]
    if arguments:
        rows = [(code(placeholder(p)), cell(help_of(p, command.callback)), default_of(p)) for p in arguments]
        parts.append(table(("argument", "what it is", "default"), rows))
    by_panel: dict[str, list[Any]] = {}
    for p in command.params:
        if not is_argument(p):
            by_panel.setdefault(text_of(getattr(p, "rich_help_panel", None)), []).append(p)
    for panel, group in by_panel.items():
        if panel:
            parts.append(f"**{panel}**\n")
        parts.append(options_table(group, kinds))
    return "\n".join(parts)


def options_table(params: Sequence[Any], kinds: dict[str, str] | None = None) -> str:
    rows = []
    for p in params:
        if p.hidden or p.name == "help":
            continue
        kind = "" if p.is_flag else p.metavar or (kinds or {}).get(p.name, "TEXT")
        names = ", ".join(code(n) for n in (*p.opts, *p.secondary_opts))
        rows.append((names + (f" {code(kind)}" if kind else ""), cell(p.help or ""), default_of(p)))
    return table(("option", "what it does", "default"), rows) if rows else ""


def is_argument(param: Any) -> bool:
    return not param.opts[0].startswith("-")


def help_of(param: Any, callback: Any) -> str:
    """As the annotation says it: typer 0.24 with click 8.5 loses an argument's."""
    hint = typing.get_type_hints(callback, include_extras=True).get(param.name)
    said = [getattr(m, "help", None) for m in getattr(hint, "__metadata__", ())]
    return next((text for text in said if text), None) or param.help or ""


def placeholder(param: Any) -> str:
    name = (param.metavar or param.name.upper()) + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def default_of(param: Any) -> str:
    value = param.default
    if param.required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Path):
        return code(value.as_posix())
    if isinstance(value, int | float | str):
        return code(number(value))
    return NONE  # None, an empty list, or what a version of click has for "not given"


def value_kinds(callback: Any) -> dict[str, str]:
    """What an option takes, by the name of the parameter, as its annotation says."""
    names = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
    hints = typing.get_type_hints(callback)  # without Annotated's extras
    kinds = {}
    for name, hint in hints.items():
        inner = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
        while inner and typing.get_origin(inner[0]) is list:
            inner = list(typing.get_args(inner[0]))
        kinds[name] = names.get(inner[0], "TEXT") if inner else "TEXT"
    return kinds


def text_of(value: Any) -> str:
    """A panel's name; typer has an object of its own where none is set."""
    return value if isinstance(value, str) else ""


# settings.md


def settings_page() -> str:
    own = {name: list(dict.fromkeys(settings_of(name))) for name in METHODS}
    edit, target = comments(EditOptions), comments(TargetOptions)
    shared = [n for n in dict.fromkeys(n for names in own.values() for n in names) if n in edit or n in target]
    default = EditOptions.method
    rest = [n for n in shared if n in target and all(n in own[m] for m in METHODS)]
    parts = [
        WRITTEN,
        "# Settings\n",
        "`--set NAME=VALUE` sets them on the command line and may be repeated; a wrong name lists those that the method\n"
        "has. `mosectl inspect PATCH` shows those a patch was made with. What the symbols mean:\n"
        "[Methods](../explanation/methods.md). Options of their own (`--rounds`, `--layers`, `--batch-size`, …) are on the\n"
        "page [Commands](commands.md#mosectl-edit).\n",
        f"Defaults are those of `{default}`, the default method; where others differ, they stand in the third column.\n",
        "## Methods\n",
        table(
            ("method", "its patches hold", "where values come from", "source"),
            [methods_row(name) for name in METHODS],
        ),
        "## Of an edit\n",
        shared_table([n for n in shared if n in edit and n not in target], edit, own),
        "These have an option of their own; the defaults depend on the method all the same:\n",
        shared_table(["rounds"], edit, own, "--"),
        "## Of the search for targets\n",
        "A target is what an edited layer should write at the fact's token. Methods that train on the model have\n"
        f"no such search; of these settings they take {' and '.join(f'`{n}`' for n in rest)}.\n",
        shared_table([n for n in shared if n in target], target, own),
        "## Of a method\n",
        table(("method", "setting", "default", "what it does"), own_rows(own)),
    ]
    return "\n".join(parts)


def methods_row(name: str) -> tuple[str, ...]:
    m = method(name)
    values = {
        "per-layer": "a target for each edited layer",
        "spread": "one target at the topmost edited layer, its residual spread over the layers",
        "none": "none are needed: the loss itself, on the model",
    }
    holds = {
        "both": "rotations on both sides",
        "output": "a rotation of the output",
        "input": "a rotation of the input",
        "additive": "a low-rank matrix that is added",
    }
    by = f"a trained network (`--editor`, [`train-editor --method {m.editor}`](commands.md#mosectl-train-editor))"
    source = re.sub(r"arXiv (\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", m.source).replace("mosectl", "this project")
    return f"`{name}`", holds.get(m.side, m.side), by if m.editor else values[m.placement], source


def settings_of(name: str) -> list[str]:
    """The names that ``--set`` lists for a method."""
    try:
        options_from(["?=1"], method=name)
    except errors.UsageError as e:
        return e.fix.removeprefix("it has: ").split(", ")
    raise AssertionError("--set took a name that is none")


def shared_table(names: Sequence[str], said: dict[str, str], own: dict[str, list[str]], prefix: str = "") -> str:
    rows, targets_own = [], {f.name for f in dataclasses.fields(TargetOptions)}
    for name in names:
        takes = [m for m in METHODS if prefix or name in own[m]]
        usual = setting(EditOptions.method, name)
        others: dict[str, list[str]] = {}
        for m in takes:
            if (value := setting(m, name)) != usual:
                others.setdefault(number(value), []).append(f"`{m}`")
        if len(others) == 1 and sum(map(len, others.values())) == len(takes) - 1:
            differ = f"all {next(iter(others))}"
        else:
            differ = "; ".join(f"{', '.join(ms)} {value}" for value, ms in others.items())
        what = cell(said[name])
        if name not in targets_own and any(name not in own[m] for m in METHODS) and not prefix:
            what = f"{what.rstrip('.')} (not of methods that train on the model)"
        rows.append((f"`{prefix}{name}`", number(usual), differ or NONE, what))
    return table(("setting", "default", "others", "what it does"), rows)


def setting(name: str, which: str) -> Any:
    chosen = default_options(name)
    return getattr(chosen.targets if hasattr(chosen.targets, which) else chosen, which)


def own_rows(own: dict[str, list[str]]) -> list[tuple[str, ...]]:
    rows = []
    for name in METHODS:
        for which, option in method(name).options.items():
            rows.append((f"`{name}`", f"`{which}`", number(float(option.default)), cell(option.help)))
    return rows


# What the code does not say yet, or only in the middle of a sentence.
UNSAID = {"steps": "optimiser steps of a target, at most"}


def comments(cls: type) -> dict[str, str]:
    """What the comments of a dataclass say of its number fields: behind the field, or in the lines before it."""
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(cls)}
    fields = {name for name, kind in kinds.items() if kind in ("int", "float") or name in WORDS}
    found: dict[str, str] = {}
    before: list[str] = []
    name = ""
    lines = StringIO(inspect.getsource(cls)).readline
    for token in tokenize.generate_tokens(lines):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                before.append(text)
            elif name:
                found[name] = text
        elif token.type == tokenize.NAME and token.line.lstrip().startswith(token.string) and not name:
            name = token.string if token.string in fields else "-"
            if before and name in fields:
                found[name] = " ".join(before)
            before = []
        elif token.type == tokenize.NEWLINE:
            name = ""
    missing = fields - set(found) - set(UNSAID) - {"seed"}
    assert not missing, f"{cls.__name__}: no comment describes {missing}"
    return {**{name: UNSAID[name] for name in fields & set(UNSAID)}, **found}


# exit-codes.md


def exit_codes_page() -> str:
    known = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.MosectlError)]
    own = {c.exit_code: f"`{c.__name__}`" for c in known if "exit_code" in vars(c)}
    own |= {0: NONE, 1: "(any other)", 130: "(Ctrl-C)", 141: "(closed pipe)"}
    rows = [(str(code), own[code], cell(meaning)) for code, (_, meaning) in errors.EXIT_CODES.items()]
    missing = {c.exit_code for c in known} - set(errors.EXIT_CODES)
    assert not missing, f"errors.py: EXIT_CODES lacks {missing}"
    inherit = [
        f"`{c.__name__}` ({c.exit_code}, as `{c.__mro__[1].__name__}`): {cell(c.__doc__)}"
        for c in known
        if "exit_code" not in vars(c)
    ]
    return "\n".join(
        [
            WRITTEN,
            "# Exit codes\n",
            "Every error says what is wrong, where, and what to do next. The classes are those of the\n"
            "[Python API](python.md#errors).\n",
            table(("code", "class", "meaning"), rows),
            *([f"Others: {'; '.join(inherit)}\n"] if inherit else []),
            "Results go to standard output, progress and errors to standard error. `MOSECTL_DEBUG=1` shows the traceback\n"
            "of an error.\n",
        ]
    )


PAGES = {"commands.md": commands_page, "settings.md": settings_page, "exit-codes.md": exit_codes_page}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for name, page in PAGES.items():
        path, text = REFERENCE / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"docs/reference/{name} is stale: run python docs/generate.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"written: docs/reference/{name}")
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
