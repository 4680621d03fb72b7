"""How to edit: one dataclass, its defaults by method, and the command line's "name=number" settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from mosectl.editing.methods import DEFAULT, method
from mosectl.editing.settings import RENAMED, UNSAID, WORDS, recorded, taking_old_names, todays
from mosectl.editing.targets import TargetOptions
from mosectl.errors import UsageError
from mosectl.hub.place import EDITOR_FILE, local
from mosectl.hypernetwork.file import Editor


@taking_old_names
@dataclass(frozen=True)
class EditOptions:
    """How to edit; the defaults are those measured for the default method (docs/LOG.md), see :func:`default_options`."""

    method: str = DEFAULT
    layers: str = "auto"  # "auto" or "3,4,5"
    batch_size: int = 0  # facts edited together; 0 = all
    rounds: int = 4  # times targets and solve alternate in a batch, at most
    preservation_decay: float = 1.0  # factor on the weight of what must keep still, from one round to the next
    unreached_weight_growth: float = 3.0  # each round weighs the facts that do not hold yet by this factor more
    prefixes: int = 2  # pieces of text put before the prompt, besides none (published: the model's own)
    wordings: int = 2  # the model's own wordings of a fact, edited along with its prompt, at most (not in a chat)
    # 1: where the tokenizer has a chat template, facts are edited in a chat, too, as replies in sentences say them; 0: not;
    # "auto": 1 with the default method.
    replies: int | None = None
    # Weight of each earlier fact against a new one; "auto": 1 at the subject's last token of a model of ten layers or more,
    # where no layers are asked for, else 50.
    previous_edit_weight: float | None = None
    # Weight of the facts' own prompts, up to the edited token, against the text in what must keep still; "auto": 1 for more
    # than 50 facts (in batches of less than a hundred: up to 300) at the subject's last token of a model of ten layers or
    # more, where no layers are asked for, else 0.
    prompt_weight: float | None = None
    # Where the values come from: "per-layer", one target a layer; "spread", one target at the top, its residual spread over
    # the layers (MEMIT); "method", the method's own way.
    placement: str = "method"
    # The token whose keys are edited (ROME's hparams call it so): "subject_last", the subject's last; "last", the prompt's;
    # "auto", the prompt's in a model of ten layers or more, unless layers of its lower half are asked for or more than 50
    # facts are edited.
    fact_token: str = "auto"
    # nats; earlier facts that lead by less are edited again along with a batch and at the end, to twice as much, `margin` at
    # most; 0 = none
    replay_margin: float = 1.0
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

    @property
    def published(self) -> bool:
        """As in the method's own code: layers, the way to values (ROME's and MEMIT's search), every update kept."""
        return self.targets.optimizer == "published"

    @property
    def weight_of_earlier(self) -> float:
        """``previous_edit_weight`` of options in which it is no longer left open (layers.settled)."""
        assert self.previous_edit_weight is not None, "which weight it is depends on the model: see layers.settled"
        return self.previous_edit_weight

    def to_record(self) -> dict[str, Any]:
        """As a patch's record has it (patches/FORMAT.md)."""
        fields = {**vars(self), "solver": dict(self.solver), "targets": self.targets.to_record()}
        for name in UNSAID:
            if fields[name] == 0:  # not None: that is open, and another cell of a bench
                del fields[name]
        return recorded(fields)


FORMS = ("auto", "compact", "dense")
TARGETS = ("steps", "gradient")
GRADIENT_DROP = 10.0  # nats; the one step is for the whole loss, not for a piece of it (docs/LOG.md)
# As if they were not given: by the model, the token and the number of facts (layers.settled), or the method's own.
AUTO = ("margin=auto", "previous_edit_weight=auto", "prompt_weight=auto", "replies=auto")
_FLAGS = ("batch_size", "rounds", "seed")  # these have a command-line option of their own


def options_from(settings: Sequence[str], **given: Any) -> EditOptions:
    """EditOptions from "name=number" settings of the solver, the targets or the edit; None among ``given`` = default.

    Raises:
        UsageError: an unknown name, told before its value is looked at, or not a number.
    """
    solver = method(given.get("method") or EditOptions.method)
    known = {f.name: str(f.type).removesuffix(" | None") for f in fields(TargetOptions)}
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(EditOptions)}
    numbers = {name: kind for name, kind in kinds.items() if kind in ("int", "float") or name in WORDS}
    own = {name: kind for name, kind in numbers.items() if name not in _FLAGS}
    whole = {name: "int" if option.whole else "float" for name, option in solver.options.items()}
    searches = {"placement", "fact_token", "prompt_weight", "previous_edit_weight", *known} - {"margin", "max_rows"}
    searching = set() if solver.searches else searches  # a fit has no such search
    found: dict[str, dict[str, Any]] = {"solver": {}, "targets": {}, "edit": {}}
    names = [*solver.defaults, *known, *own]
    for setting in (s for s in settings if s not in AUTO):
        asked = setting.partition("=")[0]
        if (now := RENAMED.get(asked, asked)) not in names:
            raise _unknown(setting, asked, solver.name, [n for n in names if n not in searching])
        if now in searching:
            what = f"--set {setting}: '{solver.name}' has its own way to values and weights, this has no part in it"
            raise UsageError(what, fix="leave it out")
        name, value = _setting(setting, {**known, **own, **whole})
        place = "solver" if name in solver.defaults else "targets" if name in known else "edit"
        found[place][name] = float(value) if place == "solver" else value  # as records of patches have it
    if given.get("form") not in (None, *FORMS):
        raise UsageError(f"--form {given['form']}: no such form", fix=f"choose one of: {', '.join(FORMS)}")
    usual = default_options(solver.name)
    how = given.pop("targets", None) or "steps"
    if how not in TARGETS:
        raise UsageError(f"--targets {how}: no such way", fix=f"choose one of: {', '.join(TARGETS)}")
    if how == "gradient":
        if not solver.searches:
            raise UsageError(f"--targets {how}: '{solver.name}' has its own way to values", fix="leave it out")
        one = replace(usual.targets, steps=1, optimizer="natural-gradient", nats_per_step=GRADIENT_DROP)
        usual = replace(usual, rounds=1, targets=one)
    given = {k: v for k, v in given.items() if v is not None} | found["edit"]
    options = replace(usual, **given, solver=found["solver"], targets=replace(usual.targets, **found["targets"]))
    if options.published and options.placement == "per-layer":
        what = "--set placement=per-layer: the published search has one target, at the topmost edited layer"
        raise UsageError(what, fix="leave it out, or give --set optimizer=adam too")
    if options.published and options.fact_token == "last":
        what = "--set fact_token=last: the published search is at the subject's last token"
        raise UsageError(what, fix="leave it out, or give --set optimizer=adam too")
    _check_choices(options)
    return options


def _check_choices(options: EditOptions) -> None:
    """Raises UsageError where a choice of two is none, or replies in a chat are asked for and cannot be edited."""
    for name, value in (("replies", options.replies), ("preserve_norm", options.targets.preserve_norm)):
        if value not in (None, 0, 1):
            raise UsageError(f"--set {name}={value}: no such choice", fix="choose one of: 0, 1")
    if not options.replies:
        return
    if options.published:
        what = "--set replies=1: as published, facts are edited in text alone"
        raise UsageError(what, fix="leave it out, or give --set optimizer=adam too")
    if options.chat:
        raise UsageError(
            "--set replies=1: with --chat there is no text beside the chat", fix="leave one of the two out"
        )


def _unknown(setting: str, name: str, method_name: str, names: Sequence[str]) -> UsageError:
    """The refusal of a setting that is none; near names, old ones too, are asked about first."""
    near = get_close_matches(name, [*names, *(old for old, now in RENAMED.items() if now in names)], 1)
    meant = f"did you mean {RENAMED.get(near[0], near[0])}? " if near else ""
    return UsageError(
        f"--set {setting}: method '{method_name}' has no such setting", fix=f"{meant}it has: {', '.join(names)}"
    )


def _setting(setting: str, types: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and value of "name=value", as today's names have it; ``types`` by name: "int", "float" or "str".

    Raises:
        UsageError: the value is not of that type, or out of range.
    """
    name, _, text = setting.partition("=")
    now = RENAMED.get(name, name)
    value = _word(setting, WORDS[now], text, name != now) if now in WORDS else _number(setting, types.get(now) == "int")
    return todays(name, value)


def _word(setting: str, words: Mapping[str, int], text: str, numbered: bool) -> str | int:
    """One of the words; ``numbered``: or the number that it was, under the old name."""
    if text in words:
        return text
    with suppress(ValueError):
        if numbered and int(text) in words.values():
            return int(text)
    raise UsageError(f"--set {setting}: no such choice", fix=f"choose one of: {', '.join(words)}")


def _number(setting: str, whole: bool) -> float:
    name, _, text = setting.partition("=")
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        what, such = ("not a whole number", "1") if whole else ("not a number", "0.5")
        raise UsageError(f"--set {setting}: {what}", fix=f"write --set {name or 'name'}={such}") from None
    if not 0 <= number < (2**63 if whole else float("inf")):  # NaN too
        raise UsageError(f"--set {setting}: out of range", fix="give a number that is neither negative nor that large")
    return number


def default_options(name: str = EditOptions.method) -> EditOptions:
    """The measured defaults of method ``name``.

    Raises:
        UsageError: no such method.
    """
    settings: dict[str, Any] = (
        {}
        if name == EditOptions.method
        else {
            "unreached_weight_growth": 1.0,
            "replay_margin": 0.0,
            "wordings": 0,
            "fact_token": "subject_last",
            "optimizer": "adam",
            **method(name).settings,
        }
    )
    aims = {f.name: settings.pop(f.name) for f in fields(TargetOptions) if f.name in settings}
    return EditOptions(method=method(name).name, **settings, targets=TargetOptions(**aims))


def trained_editor(options: EditOptions) -> Editor | None:
    """The trained editor that the options name, for a method that needs one.

    Raises:
        UsageError: it is missing, not wanted, or was trained for another method. PatchError: it is damaged. HubError.
    """
    solver = method(options.method)
    if not solver.editor:
        if options.editor:
            raise UsageError(
                f"method '{solver.name}' takes no editor", fix="leave --editor out, or give --method horse"
            )
        return None
    if options.editor is None:
        fix = f"give --editor FILE; make one with: mosectl train-editor FACTS --method {solver.editor} --model MODEL"
        raise UsageError(f"method '{solver.name}' needs a trained editor", fix=fix)
    editor = Editor.load(local(options.editor, EDITOR_FILE))
    if editor.method != solver.editor:
        what = f"the editor was trained for '{editor.method}', not for '{solver.name}'"
        raise UsageError(what, where=options.editor, fix=f"edit with --method {editor.method}")
    return editor
