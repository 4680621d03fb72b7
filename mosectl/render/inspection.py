"""What `mosectl inspect` shows of a patch: where it comes from, its rotations, its facts, what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mosectl.editing.settings import UNSAID, of_today
from mosectl.facts.probe import recorded_not_counted
from mosectl.render import scores
from mosectl.render.console import line, size, table
from mosectl.render.terminal import own_wordings, place, stability
from mosectl.text.table import Grid

if TYPE_CHECKING:
    from mosectl.checkpoints.inspection import FactorReport, Inspection
    from mosectl.patch.file import Patch


def inspection(i: Inspection) -> None:
    """A patch: where it comes from, its rotations, its facts."""
    p = i.patch
    table(f"Patch {p.id}", ("", ""), origin(i))  # there an id of 64 digits fits into a line
    for grid in factors(i.factors):
        table(grid.title, grid.columns, grid.rows)
    by_module = {r.module: r for r in i.factors}.values()
    if drifts := [r.stability for r in by_module if r.stability]:
        stability("Effect on the model, stored dtype", drifts)
    for r in by_module:
        if r.base:
            line(f"{r.module}: {r.base}")
    table(
        f"Facts ({len(p.facts)})",
        ("prompt", "before", "after", ">P(new) before", ">P(new) after", ""),
        [scores.of_fact(f.prompt, f, f.status) for f in p.facts],
    )
    own_wordings(p.facts)
    _measured(p)


def origin(i: Inspection) -> list[tuple[str, str]]:
    """Where a patch comes from, and how it was made."""
    p = i.patch
    return [
        ("method", f"{p.method} ({p.side} side{'s' * (p.side == 'both')}), seed {p.seed}"),
        ("base model", f"{p.model} ({p.model_type})" + (f" @ {p.revision}" if p.revision else "")),
        ("made with", ", ".join(f"{k} {v}" for k, v in p.versions.items())),
        ("file", size(i.file_bytes)),
        ("options", ", ".join(_settings({**_zeros(p.options), **p.options}))),
        ("on top of", ", ".join(x[:12] for x in p.parents) or "the base model"),
    ]


def factor(r: FactorReport) -> str:
    """A factor as formulas have it; a patch file calls L "R" and R "R_in" (patches/FORMAT.md)."""
    return {"R": "L", "R_in": "R"}.get(r.factor, r.factor)


def factors(found: Sequence[FactorReport]) -> tuple[Grid, Grid]:
    """Every factor, a table of what it is and one of what it does: together they are wider than most terminals."""
    names = [place(r.module) for r in found]
    made = tuple(
        (name, factor(r), r.form, "×".join(map(str, r.shape)), str(r.rank), _or_dash(r.left_out, ".1%"))
        for name, r in zip(names, found, strict=True)
    )
    does = tuple(
        (name, factor(r), _or_dash(r.orthogonality_error, ".1e"), _or_dash(r.largest_angle, ".1f", "°"),
         _or_dash(r.median_angle, ".2f", "°"), f"{r.distance:.3f}")
        for name, r in zip(names, found, strict=True)
    )  # fmt: skip
    columns = ("module", "factor", ">orthogonality error", ">max angle", ">median angle", ">distance")
    return (
        Grid("Factors (W' = L W R, or W + B A)", ("module", "factor", "form", ">size", ">rank", ">left out"), made),
        Grid("How far they turn", columns, does),
    )


def _measured(p: Patch) -> None:
    """What a patch says was measured when it was made; older ones have no groups of prompts."""
    metrics = p.metrics
    if recorded := metrics.get("shares"):
        title = "Measured when it was made (protocol generation)"
        table(title, scores.COLUMNS, list(scores.of_patch(recorded, metrics.get("scores", {}))))
        line(scores.AS_QA)
        for told in recorded_not_counted(metrics):
            line(told)
    elif found := {k: v for k, v in metrics.get("scores", {}).items() if isinstance(v, float)}:
        told = ", ".join(f"{k} {v:.1%}" for k, v in found.items())
        line(f"measured when it was made (protocol generation): {told}")
    if moved := metrics.get("next_tokens"):
        table(scores.next_title(p.options), scores.NEXT_RECORDED, scores.of_next_recorded(moved))


def _zeros(options: Mapping[str, Any]) -> dict[str, int]:
    """What an edit's record does not say."""
    return dict.fromkeys(UNSAID, 0) if "batch_size" in options else {}


def _settings(options: Mapping[str, Any]) -> Iterator[str]:
    """Every setting as "name=value", those of the solver, the targets and the corpus with them."""
    for name, value in options.items():
        if name == "merged":
            yield f"merged of {', '.join(str(p.get('id'))[:12] for p in value)}"
        elif isinstance(value, dict):
            yield from _settings(value) if name in ("solver", "targets") else [f"{name}={value.get('name')}"]
        elif name == "facts" and isinstance(value, list):
            yield f"{name}={' '.join(value)}"
        else:
            yield "{}={}".format(*of_today(name, value))


def _or_dash(number: float | None, form: str, unit: str = "") -> str:
    return "–" if number is None else f"{number:{form}}{unit}"
