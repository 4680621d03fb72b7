"""How to edit: one dataclass, its defaults by method, and the command line's "name=number" settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mosectl.editing.methods import method
from mosectl.editing.targets import TargetOptions
from mosectl.errors import UsageError
from mosectl.hub.place import EDITOR_FILE, local
from mosectl.hypernetwork.file import Editor


@dataclass(frozen=True)
class EditOptions:
    """How to edit; the defaults are those measured for the default method (docs/LOG.md), see :func:`default_options`."""

    method: str = "isospectral"
    layers: str = "auto"  # "auto" or "3,4,5"
    batch_size: int = 0  # facts edited together; 0 = all
    rounds: int = 4  # times targets and solve alternate in a batch, at most
    relax: float = 1.0  # each round weighs what must keep still by this factor less, for the facts that still resist
    insist: float = 3.0  # each round weighs the facts that do not hold yet by this factor more
    prefixes: int = 2  # pieces of text put before the prompt, besides none
    wordings: int = 2  # the model's own wordings of a fact, edited along with its prompt, at most (not in a chat)
    protect: float = 50.0  # weight of each earlier fact against a new one
    # Where the values come from: 0 one target a layer, 1 one target at the top, its residual spread over the layers (MEMIT);
    # −1 the method's own way.
    aim: int = -1
    rehearse: float = 1.0  # nats; earlier facts that lead by less are edited again along with a batch; 0 = none
    guard: float = 1.0  # nats a token by which ordinary text may become less likely before a run is stopped; 0 = any
    form: str = (
        "auto"  # of rotations in the patch: "compact" (low rank), "dense", or the smaller where no fact is lost by it
    )
    compaction: float = 0.05  # what a compact form may leave out of the edit's effect, as a share of it
    seed: int = 0
    chat: bool = False
    corpus: str | None = None  # None = embedded
    editor: str | None = None  # editor file (or hf://user/repo), for methods that need a trained one
    solver: Mapping[str, float] = field(default_factory=dict)  # the method's own options
    targets: TargetOptions = field(default_factory=TargetOptions)


FORMS = ("auto", "compact", "dense")
TARGETS = ("steps", "gradient")
GRADIENT_DROP = 10.0  # nats; the one step is for the whole loss, not for a piece of it (docs/LOG.md)
_FLAGS = ("batch_size", "rounds", "seed")  # these have a command-line option of their own


def options_from(settings: Sequence[str], **given: Any) -> EditOptions:
    """EditOptions from "name=number" settings of the solver, the targets or the edit; None among ``given`` = default.

    Raises:
        UsageError: an unknown name, or not a number.
    """
    solver = method(given.get("method") or EditOptions.method)
    known = {f.name: f.type for f in fields(TargetOptions)}
    own = {f.name: f.type for f in fields(EditOptions) if f.type in ("int", "float") and f.name not in _FLAGS}
    searching = {"aim", *known} - {"margin", "max_rows"} if solver.kind == "fit" else set()  # a fit has no such search
    found: dict[str, dict[str, Any]] = {"solver": {}, "targets": {}, "edit": {}}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            number = int(text) if "int" in (known.get(name), own.get(name)) else float(text)
        except ValueError:
            whole = "int" in (known.get(name), own.get(name))
            what = "not a whole number" if whole else "not a number"
            raise UsageError(f"--set {setting}: {what}", fix=f"write --set name={'3' if whole else '0.5'}") from None
        place = "solver" if name in solver.defaults else "targets" if name in known else "edit" if name in own else None
        if place is None:
            names = ", ".join(n for n in (*solver.defaults, *known, *own) if n not in searching)
            raise UsageError(f"--set {setting}: method '{solver.name}' has no such setting", fix=f"it has: {names}")
        lowest, highest = (-1, 1) if name == "aim" else (0, float("inf"))
        if not lowest <= number <= highest:  # NaN too
            fix = (
                "-1, 0 or 1: see docs/explanation/methods.md" if name == "aim" else "give a number that is not negative"
            )
            raise UsageError(f"--set {setting}: out of range", fix=fix)
        if name in searching:
            raise UsageError(f"--set {setting}: '{solver.name}' has its own way to values", fix="leave it out")
        found[place][name] = number
    if given.get("form") not in (None, *FORMS):
        raise UsageError(f"--form {given['form']}: no such form", fix=f"choose one of: {', '.join(FORMS)}")
    usual = default_options(solver.name)
    how = given.pop("targets", None) or "steps"
    if how not in TARGETS:
        raise UsageError(f"--targets {how}: no such way", fix=f"choose one of: {', '.join(TARGETS)}")
    if how == "gradient":
        if solver.kind == "fit":
            raise UsageError(f"--targets {how}: '{solver.name}' has its own way to values", fix="leave it out")
        one = replace(usual.targets, steps=1, fisher=1, drop=GRADIENT_DROP)
        usual = replace(usual, rounds=1, targets=one)
    given = {k: v for k, v in given.items() if v is not None} | found["edit"]
    return replace(usual, **given, solver=found["solver"], targets=replace(usual.targets, **found["targets"]))


def default_options(name: str = EditOptions.method) -> EditOptions:
    """The measured defaults of method ``name``.

    Raises:
        UsageError: no such method.
    """
    settings: dict[str, Any] = (
        {}
        if name == EditOptions.method
        else {"insist": 1.0, "rehearse": 0.0, "wordings": 0, "fisher": 0, **method(name).settings}
    )
    aims = {f.name: settings.pop(f.name) for f in fields(TargetOptions) if f.name in settings}
    return EditOptions(method=method(name).name, **settings, targets=TargetOptions(**aims))


def trained_editor(options: EditOptions) -> Editor | None:
    """The trained editor that the options name, for a method that needs one.

    Raises:
        UsageError: it is missing, not wanted, or was trained for another method. PatchError: it is damaged. HubError.
    """
    solver = method(options.method)
    if not solver.trained:
        if options.editor:
            raise UsageError(
                f"method '{solver.name}' takes no editor", fix="leave --editor out, or give --method horse"
            )
        return None
    if options.editor is None:
        fix = f"give --editor FILE; make one with: mosectl train-editor FACTS --method {solver.trained} --model MODEL"
        raise UsageError(f"method '{solver.name}' needs a trained editor", fix=fix)
    editor = Editor.load(local(options.editor, EDITOR_FILE))
    if editor.method != solver.trained:
        what = f"the editor was trained for '{editor.method}', not for '{solver.name}'"
        raise UsageError(what, where=options.editor, fix=f"edit with --method {editor.method}")
    return editor
