"""What a page says of one patch, section by section: all of it from the patch's own record and factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mosectl.editing.guard import CONDITION_LIMIT, NORM_LIMIT
from mosectl.facts.groups import SAME_SUBJECT
from mosectl.facts.probe import recorded_not_counted
from mosectl.model.generation import says
from mosectl.patch.record import HOLDS
from mosectl.render import inspection, page, scores
from mosectl.render.console import in_one_unit
from mosectl.render.html import chance, cohorts_table
from mosectl.render.page import Cell, Mark, Section, Table, Terms, Words, firm, table
from mosectl.render.terminal import place
from mosectl.text.shown import answer_cell, counted

if TYPE_CHECKING:
    from mosectl.checkpoints.inspection import Inspection
    from mosectl.facts.writer import Missed
    from mosectl.measure.retention import Cohort
    from mosectl.patch.file import Patch
    from mosectl.patch.record import PatchFact

FACTS = ("~prompt", "new object", "before", "right after", "after", ">P(new) before", ">P(new) after")
OVERVIEW = (
    "file", "!patch", "!method", "model", "!layers", ">facts", ">held right after", ">held at the end",
    ">rephrasings (QA)", ">locality kept (QA)", ">same subject kept (QA)", ">own probes kept (QA)", ">largest σ drift",
    ">size, {}", "!file's date",
)  # fmt: skip
SHARES = (  # of the overview: metric, group, whether the prompts are mosectl's own
    ("generalization", "", False), ("locality", "", False),
    ("locality", SAME_SUBJECT, False), ("locality", SAME_SUBJECT, True),
)  # fmt: skip
OVERVIEW_ABOUT = (
    "Held: greedy answers to the bare prompt, as the patches record them. Rephrasings: answered with the new object; "
    "locality: prompts of the facts file that shall stay as they were. Same subject: what it asks about the "
    "subjects otherwise; own probes: what mosectl asks about them where the file does not. QA: the share as QA compares, "
    "the more lenient of the two in a patch's own section."
)


def overview(patches: Sequence[tuple[str, str, Inspection]]) -> tuple[Table, ...]:
    """Every patch as a row: its file, the file's date, and what is known of it."""
    unit, sizes = in_one_unit([i.file_bytes for _, _, i in patches])
    rows = [_overview(*found, size) for found, size in zip(patches, sizes, strict=True)]
    return table([name.format(unit) for name in OVERVIEW], rows, about=OVERVIEW_ABOUT, cards=True)


def _overview(file: str, written: str, i: Inspection, size: str) -> tuple[str, ...]:
    p = i.patch
    then = [says(f.right_after, *f.targets) for f in p.facts if f.right_after is not None]
    drifts = [s["spectrum_drift"] for s in p.metrics.get("stability", ()) if "spectrum_drift" in s]
    return (
        short(file, p), p.id[:12], p.method, p.model, layers(p), f"{len(p.facts):,}", f"{sum(then):,}" if then else "–",
        f"{sum(f.status in HOLDS for f in p.facts):,}", *(_share(p, *which) for which in SHARES),
        f"{max(drifts):.1e}" if drifts else "–", size, written.split(" ")[0],
    )  # fmt: skip


def short(file: str, p: Patch) -> str:
    """A file that an edited model keeps is called by the whole id."""
    return file.replace(f"{p.id}.safetensors", f"{p.id[:12]}…")


def layers(p: Patch) -> str:
    """The layers that a patch edits, as `--layers` takes them: "2-4, 7"; its modules' names where they have no numbers."""
    names = [place(m) for m in p.changes]
    numbers = sorted({int(n.split(" ")[0]) for n in names if n.split(" ")[0].isdecimal()})
    if len(numbers) < len(names):
        return ", ".join(names)
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _share(p: Patch, *wanted: str | bool) -> str:
    """What a patch has recorded of a metric and group, as QA compares."""
    found = [s["qa"] for s in p.metrics.get("shares", ()) if (s["metric"], s["group"], s["own"]) == wanted]
    return scores.percent(found[0]) if found else "–"


def section(
    file: str, written: str, i: Inspection, cohorts: Sequence[Cohort], missed: Sequence[Missed]
) -> Section | None:
    """All of a patch."""
    p = i.patch
    told = [("file", file), ("file's date", written), ("id", p.id), ("layers", layers(p))]
    about = Terms((*told, *((k if k != "file" else "size", v) for k, v in inspection.origin(i) if v)))
    not_taken = [(m.prompt, m.target_new, Mark(m.status, False)) for m in missed]
    return Section(
        f"Patch {p.id[:12]}",
        (about,),
        page.sections(
            Section("Facts", _facts(p.facts)),
            Section("Missed facts", table(("~prompt", "new object", "!status"), not_taken, cards=True)),
            Section("Measured when it was made", _measured(p)),
            Section("Old facts and new ones", cohorts_table(cohorts)),
            Section("What the guard watches", _guard(p)),
            Section("Spectrum", _spectrum(i)),
        ),
    )


def _facts(facts: Sequence[PatchFact]) -> tuple[Table | Words, ...]:
    batches = any(f.right_after is not None for f in facts)
    verdicts = ("!held right after", "!at the end") if batches else ("!verdict",)
    head = (*(name for name in FACTS if batches or name != "right after"), *verdicts)
    found: tuple[Table | Words, ...] = table(head, [_fact(f, batches) for f in facts], cards=True)
    if own := sum(len(f.wordings) for f in facts):
        found += (Words(f"{counted(own, 'wording')} of the model's own were edited along with the prompts."),)
    return found


def _fact(f: PatchFact, batches: bool) -> tuple[Cell, ...]:
    end = Mark(f.status, f.status in HOLDS)
    p = chance(f.probability_before), chance(f.probability_after)
    if not batches:
        return f.prompt, f.target_new, answer_cell(f.before), answer_cell(f.after), *p, end
    then = None if f.right_after is None else says(f.right_after, *f.targets)
    held = Mark({None: "not asked", True: "held", False: "did not hold"}[then], then)
    said = map(answer_cell, (f.before, f.right_after, f.after))
    return f.prompt, f.target_new, *said, *p, held, end


def _measured(p: Patch) -> tuple[Table | Words, ...]:
    out: tuple[Table | Words, ...] = ()
    metrics = p.metrics
    if recorded := metrics.get("shares"):
        rows = [row for row in scores.of_patch(recorded, metrics.get("scores", {})) if row[1:3] != ("–", "–")]
        head = ("!metric", *scores.COLUMNS[1:])
        out += table(head, rows, about=f"Protocol generation; {scores.AS_QA}.", cards=True)
        out += tuple(Words(f"{told}.") for told in recorded_not_counted(metrics))
    elif found := {k: v for k, v in metrics.get("scores", {}).items() if isinstance(v, float)}:
        out += table(("!metric", ">share"), [(k, f"{v:.1%}") for k, v in found.items()], about="Protocol generation.")
    if moved := metrics.get("next_tokens"):
        out += table(firm(scores.NEXT_RECORDED), scores.of_next_recorded(moved), title=scores.next_title(p.options))
    return out


def _guard(p: Patch) -> tuple[Table, ...]:
    """The numbers that end a run, as far as a patch knows them: those of the weights, and what was allowed."""
    limit, rows = p.options.get("guard"), []
    for name, title, most in (("norm", "‖W‖", NORM_LIMIT), ("condition", "κ(W)", CONDITION_LIMIT - 1)):
        if found := [s[f"{name}_drift"] for s in p.metrics.get("stability", ()) if f"{name}_drift" in s]:
            rows.append((f"{title}, largest relative change", f"{max(found):.1e}", f"{most:g}"))
    if rows and isinstance(limit, int | float) and not isinstance(limit, bool):
        allowed = f"{limit:g}" if limit > 0 else "any"
        rows.append(("ordinary text, rise of its loss in nats a token", "not recorded", allowed))
    about = "The guard ends a run after a batch with more than is allowed; a patch holds the batches before it."
    return table(("what", ">found", ">allowed"), rows, about=about)


def _spectrum(i: Inspection) -> tuple[Table, ...]:
    """Norm, condition and singular values as recorded; the factors as they are in the file."""
    drifts = [s for s in i.patch.metrics.get("stability", ()) if {"norm_before", "spectrum_drift"} <= s.keys()]
    rows = [
        (place(s["name"]), *(_or_dash(s, k, ".4g") for k in ("norm_before", "condition_before")),
         *(_or_dash(s, k, ".1e") for k in ("norm_drift", "condition_drift", "spectrum_drift")))
        for s in drifts
    ]  # fmt: skip
    out = table(firm(scores.STABILITY), rows, title="The changed W against W, float32, as recorded")
    for grid in inspection.factors(i.factors):
        out += table(firm(grid.columns), grid.rows, title=grid.title)
    return out


def _or_dash(values: Mapping[str, Any], name: str, form: str) -> str:
    return f"{values[name]:{form}}" if name in values else "–"
