"""A bench as tables and pictures, from its records alone: they can be made again at any time.

Tables follow MOSE's Tables 1 (what the edits reached) and 2 (what general ability they cost), one pair a kind of run;
pictures its Figures 2 (norm and condition number over edits) and 3 (abilities over edits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mosectl.bench.config import OTHERS, Bench, Cell, RunKind
from mosectl.bench.runner import Record, records_of
from mosectl.facts.groups import shown
from mosectl.measure.bootstrap import over_seeds, paired_lead
from mosectl.render import charts
from mosectl.storage.atomic import write_bytes
from mosectl.text.markdown import inline, table
from mosectl.text.table import Grid

PROTOCOL = "protocol generation: greedy answers, asked after all edits"
SHARES = ("reliability", "generalization", "locality")
PROPER = ("layers", "wordings", "targets", "solve", "guard", "check")  # phases of the edit proper
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d", "#d67195", "#79706e", "#bab0ac")
DASHES = ("", "6 3", "2 3")  # for more methods than colours
_GROUPS = (
    "\n(QA): compared as question answering does: case, articles, punctuation and a leading 'the city of' aside; a locality "
    "prompt is kept where it gets the known answer again, else the same first three words. Known wordings: rephrasings that "
    "the unedited model answered with the old object. Harmonic mean of four: of reliability, generalization over known "
    "wordings, neighbours and same subject, all (QA)."
)
_NAME_SPACE = 'xmlns="http://www.w3.org/2000/svg" '
_STYLE = """svg { background: #fff; } text { fill: #1c1f24; font: 13px system-ui, sans-serif; }
text.small { fill: #667; font-size: 11px; } .grid { stroke: #d8dbe0; } .curve { fill: none; stroke-width: 1.8; }"""


def write_report(bench: Bench, wanted: Sequence[Cell], found: Mapping[str, Record], folder: Path) -> list[Path]:
    """(Re)write tables.md, norms.svg and abilities.svg; returns what was written."""
    records = records_of(wanted, found)
    files = {"tables.md": markdown(bench, tables(wanted, found)), "norms.svg": svg_norms(records)}
    files["abilities.svg"] = svg_abilities(records)
    for name, text in files.items():
        write_bytes(folder / name, text.encode())
    return [folder / name for name in files]


# Tables.


def tables(wanted: Sequence[Cell], found: Mapping[str, Record]) -> list[Grid]:
    """Two tables a kind of run, one row a model, dataset and method; seeds are averaged."""
    out = []
    head = ("model", "dataset", "method")
    for run in dict.fromkeys(c.run for c in wanted):
        rows = _grouped([c for c in wanted if c.run == run])
        reached, cost = [], []
        groups = _groups([found[c.key] for names in rows.values() for c in names if c.key in found])
        first: dict[tuple[str, str], list[Record]] = {}  # of each model and dataset: the runs others are compared with
        for names, cells in rows.items():
            records = [found[c.key] for c in cells if c.key in found]
            good = [r for r in records if r["status"] == "done"]
            note = _note(len(cells), records)
            lead = _lead(first.setdefault(names[:2], good), good)
            reached.append((*names, *_reached(good), lead, *_by_group(good, groups), note))
            cost.append((*names, *_cost(good), note))
        columns = (*(f">{n}" for n in SHARES), ">on unseen wordings", ">harmonic mean", ">behind the first")
        columns += (*(f">{name}" for name in _group_columns(groups)), "note")
        out.append(Grid(f"{run}: what they reached ({PROTOCOL})", (*head, *columns), tuple(reached)))
        columns = (">text loss before", ">after", ">perplexity before", ">after", ">other facts kept")
        columns += (">‖W‖ drift", ">κ(W) drift", ">largest σ drift", ">seconds", ">edits/s", "note")
        out.append(Grid(f"{run}: what they cost", (*head, *columns), tuple(cost)))
    return out


def _groups(records: Sequence[Record]) -> list[str]:
    """The groups of locality prompts that the data sets name."""
    return list(dict.fromkeys(name for r in records for name in r.get("groups", {})))


def _group_columns(groups: Sequence[str]) -> list[str]:
    if not groups:
        return []
    return ["on known wordings (QA)", *(f"{shown(g)} (QA)" for g in groups), "harmonic mean of four"]


def _by_group(records: Sequence[Record], groups: Sequence[str]) -> list[str]:
    if not groups:
        return []
    out = [_summary([r.get("known") for r in records], _percent)]
    out += [_summary([r.get("groups", {}).get(name) for r in records], _percent) for name in groups]
    four = [{"value": v} for r in records if (v := r.get("harmonic_of_four")) is not None]
    return [*out, _summary(four, _percent)]


def _grouped(cells: Sequence[Cell]) -> dict[tuple[str, str, str], list[Cell]]:
    """Cells that differ in their seed only."""
    out: dict[tuple[str, str, str], list[Cell]] = {}
    for c in cells:
        out.setdefault((c.model, c.dataset.name, c.label), []).append(c)
    return out


def _note(cells: int, records: Sequence[Record]) -> str:
    """What did not go as asked."""
    failed = [r["reason"] for r in records if r["status"] == "failed"]
    out = []
    if len(records) < cells:
        out.append("not run yet" if not records else f"{cells - len(records)} of {cells} seeds not run yet")
    if failed:
        out.append(("failed" if cells == 1 else f"{len(failed)} of {cells} seeds failed") + f": {failed[0]}")
    out += [f"stopped early: {r['stopped']}" for r in records if r.get("stopped")][:1]
    return "; ".join(out)


def _reached(records: Sequence[Record]) -> list[str]:
    out = [_summary([r["scores"].get(name) for r in records], _percent) for name in SHARES]
    out.append(_summary([r.get("unseen") for r in records], _percent))
    return [*out, _summary([{"value": r["harmonic"]} for r in records], _percent)]


def _lead(first: Sequence[Record], records: Sequence[Record]) -> str:
    """How far the harmonic mean lies behind the first method's: points, with the 95 % interval of the paired difference."""
    if records is first or not records:
        return "–"
    pairs = [(a, b) for a in first for b in records if a["seed"] == b["seed"]]
    if not pairs:
        return "–"
    if len(pairs) > 1:
        mean, half = over_seeds([a["harmonic"] - b["harmonic"] for a, b in pairs])
        low, high = mean - half, mean + half
    elif all(r.get("tallies") for r in pairs[0]) and pairs[0][0]["edits"] == pairs[0][1]["edits"]:
        mean, low, high = paired_lead(*([r["tallies"][name] for name in SHARES] for r in pairs[0]))
    else:
        return _percent(pairs[0][0]["harmonic"] - pairs[0][1]["harmonic"])
    return f"{_percent(mean)} ({_percent(low)} to {_percent(high)})"


def _cost(records: Sequence[Record]) -> list[str]:
    out = []
    for name in ("text_loss", "perplexity"):
        out += [_summary([r[name].get(side) for r in records], "{:.3f}".format, False) for side in ("before", "after")]
    out.append(_summary([r.get("kept") for r in records], _percent))
    for name in ("norm", "condition", "spectrum"):
        out.append(_summary([{"value": r["drift"].get(name)} for r in records], "{:.1e}".format))
    out.append(_summary([{"value": r["seconds"].get("all")} for r in records], "{:.1f}".format))
    return [*out, _summary([{"value": pace} for r in records if (pace := _pace(r))], "{:.2g}".format)]


def _pace(record: Record) -> float | None:
    """Facts a second of the edit proper: no loading, no statistics, nothing asked."""
    took = sum(record["seconds"].get(phase, 0.0) for phase in PROPER)
    return record["edits"] / took if took else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _summary(measures: Sequence[Any], form: Callable[[float], str], interval: bool = True) -> str:
    """One seed: the value and its interval; several: their mean and its interval. null in a record was not finite."""
    asked = [m for m in measures if m is not None]
    if not asked:
        return "–"
    values = [m["value"] for m in asked]
    if any(v is None for v in values):
        return "not finite"
    if len(values) > 1:
        mean, half = over_seeds(values)
        return f"{form(mean)} ± {form(half)}" if half else form(mean)
    low, high = asked[0].get("low"), asked[0].get("high")
    bounds = f" ({form(low)}–{form(high)})" if interval and low is not None and high is not None and low < high else ""
    return form(values[0]) + bounds


def markdown(bench: Bench, grids: Sequence[Grid]) -> str:
    """All tables, and how to read them."""
    several = len(bench.seeds) > 1
    named = any("harmonic mean of four" in c for grid in grids for c in grid.columns)
    lines = [
        f"# {inline(bench.name)}",
        "",
        "Shares in percent under the protocol `generation`, asked after all edits, "
        + (
            f"mean over {len(bench.seeds)} seeds ± half of its 95 % interval (Student's t; none: the same in all). "
            if several
            else "with 95 % intervals over facts. "
        )
        + "Unseen wordings: rephrasings that were not edited along as the model's own wordings of the fact. Behind the "
        + "first: harmonic mean of the first method less this one's, in points, interval of the paired difference over "
        + ("seeds. " if several else "facts. ")
        + "Text loss in nats a token. "
        + f"Other facts kept: of up to {OTHERS} facts that follow the edited ones, those answered as before. "
        + "Drifts are relative, the largest over the edited weights, in float32. The collapse guard is off unless set. "
        + "Curves are taken after each batch, that of the text on the collapse guard's few pieces of the corpus: what a "
        + "method does once at the end (prune) comes after their last point.",
        *([_GROUPS] if named else []),
        *(f"\nNote: {inline(note)}." for note in bench.notes),
    ]
    for grid in grids:
        lines += ["", f"## {inline(grid.title)}", "", *table(grid.columns, grid.rows)]
    return "\n".join([*lines, "", "![norms](norms.svg)", "", "![abilities](abilities.svg)", ""])


# Pictures.

Points = list[tuple[float, float]]  # (edits, value)


@dataclass(frozen=True)
class Panel:
    """One diagram: a line a method."""

    title: str
    lines: dict[str, Points]  # by label


def svg_norms(records: Sequence[Record]) -> str:
    """‖W‖ and κ(W) against the base's over edits, the geometric mean of the edited layers."""
    return _svg(
        records, {"‖W‖ / base": _ratio("norm"), "κ(W) / base": _ratio("condition")}, "Norm and condition number"
    )


def svg_abilities(records: Sequence[Record]) -> str:
    """The loss of ordinary text over edits, as the collapse guard measures it after each batch: on pieces of the corpus."""

    def loss(curve: Sequence[Record]) -> Points:
        return [(p["edits"], p["loss"]) for p in curve if p.get("loss") is not None]

    return _svg(records, {"loss on the guard's pieces of text, nats a token": loss}, "Text loss over edits")


def _ratio(name: str) -> Callable[[Sequence[Record]], Points]:
    def points(curve: Sequence[Record]) -> Points:
        base = curve[0][name]
        out = []
        for p in curve:
            both = [(p[name].get(k) or 0, base[k] or 0) for k in base]
            ratios = [now / before for now, before in both if now > 0 and before > 0]
            if ratios and len(ratios) == len(base):  # else a number was not finite
                out.append((p["edits"], math.exp(fmean(map(math.log, ratios)))))
        return out

    return points


def _svg(records: Sequence[Record], measured: Mapping[str, Callable[[Sequence[Record]], Points]], about: str) -> str:
    """A row of panels for each model, dataset and kind of run; below them the methods' colours."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        if r.get("curve"):
            groups.setdefault((r["model"], r["dataset"], r["edits"], r["batch_size"]), []).append(r)
    labels = list(dict.fromkeys(r["label"] for r in records))
    kinds = [_kind(i) for i in range(len(labels))]
    high, columns = 210, len(measured)
    width = (charts.WIDTH - 20) / columns
    legend = 22 * (-(-len(labels) // 3))
    out = [charts.opening(high * len(groups) + legend + 30, about, _NAME_SPACE), f"<style>{_STYLE}</style>"]
    for row, ((model, dataset, edits, size), members) in enumerate(groups.items()):
        out.append(charts.text(20, row * high + 16, f"{model} · {dataset} · {RunKind(edits, size)}", "start"))
        for column, (name, points) in enumerate(measured.items()):
            lines = {label: _averaged([points(r["curve"]) for r in members if r["label"] == label]) for label in labels}
            box = (column * width + 60, row * high + 50, (column + 1) * width - 6, (row + 1) * high - 20)
            out += _panel(Panel(name, lines), kinds, box)
    if not groups:
        out.append(charts.text(20, 24, "no run has a curve yet", "start"))
    for i, label in enumerate(labels):
        x, y = 20 + (i % 3) * 235, high * len(groups) + 24 + 22 * (i // 3)
        out.append(_polyline([(x, y - 4), (x + 24, y - 4)], kinds[i]))
        out.append(charts.text(x + 30, y, label, "start", "small"))
    return "\n".join([*out, "</svg>"]) + "\n"


def _kind(i: int) -> str:
    """A method's stroke."""
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[i % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="curve" {kind} points="{path}"/>'


def _averaged(curves: Sequence[Points]) -> Points:
    """The mean over seeds at each number of edits."""
    at: dict[float, list[float]] = {}
    for x, y in (p for curve in curves for p in curve):
        at.setdefault(x, []).append(y)
    return [(x, fmean(ys)) for x, ys in sorted(at.items())]


def _panel(panel: Panel, kinds: Sequence[str], box: tuple[float, float, float, float]) -> list[str]:
    """One diagram inside (left, top, right, bottom); the scale is logarithmic where values span more than tenfold."""
    left, top, right, bottom = box
    values = [y for points in panel.lines.values() for _, y in points]
    last = max((x for points in panel.lines.values() for x, _ in points), default=1) or 1
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = low > 0 and high > 10 * low
    scale: Callable[[float], float] = math.log10 if log else lambda v: v
    if high - low < 0.02 * abs(high):  # a flat line shall look flat
        low, high = low - 0.01 * abs(high), high + 0.01 * abs(high)
    span = scale(high) - scale(low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * (scale(y) - scale(low)) / span

    out = [charts.text(left, top - 12, panel.title + (" (log)" if log else ""), "start", "small")]
    for share in (0.0, 0.5, 1.0):
        value = scale(low) + share * span
        y = bottom - (bottom - top) * share
        out.append(charts.line(left, y, right, y, "grid"))
        out.append(charts.text(left - 6, y + 4, f"{10**value if log else value:.4g}", "end", "small"))
    out.append(charts.text(left, bottom + 14, "0", "middle", "small"))
    out.append(charts.text(right, bottom + 14, f"{last:g} edits", "end", "small"))
    lines = [
        _polyline([at(x, y) for x, y in points], kind)
        for points, kind in zip(panel.lines.values(), kinds, strict=True)
        if len(points) > 1
    ]
    return out + lines[::-1]  # the first method on top: curves that do not move lie over each other
