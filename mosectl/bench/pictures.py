"""A bench's pictures from its records, as SVG by hand.

MOSE's Figures 2 (norm and condition number over edits) and 3 (abilities over edits), what is left of facts by their place in
a run, and the frontier: how far facts carry over to other words against how much else stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mosectl.bench.config import RunKind
from mosectl.bench.runner import Record
from mosectl.facts.groups import NEIGHBOURS, SAME_SUBJECT, shown
from mosectl.measure.bootstrap import over_seeds
from mosectl.render import charts
from mosectl.text.shown import markup

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d", "#d67195", "#79706e", "#bab0ac")
DASHES = ("", "6 3", "2 3")  # for more methods than colours
_NAME_SPACE = 'xmlns="http://www.w3.org/2000/svg" '
_STYLE = """svg { background: #fff; } text { fill: #1c1f24; font: 13px system-ui, sans-serif; }
text.small { fill: #667; font-size: 11px; } .grid { stroke: #d8dbe0; } .curve { fill: none; stroke-width: 1.8; }
.whisker { fill: none; stroke-width: 1; opacity: 0.7; }"""
KEPT = (SAME_SUBJECT, NEIGHBOURS)  # a panel of the frontier each
_FRONTIER_HELP = (
    "Lines: 95 % intervals. Up and right is better: the fact carries over to other words, and nothing else changes."
)


@dataclass(frozen=True)
class Kind:
    """A method's stroke."""

    colour: str
    dash: str

    def __str__(self) -> str:
        return f'stroke="{self.colour}"' + (f' stroke-dasharray="{self.dash}"' if self.dash else "")


Points = list[tuple[float, float]]  # (edits, value)
Measured = Mapping[str, Callable[[Sequence[Record]], Points]]  # by the title of its panel: points from records of a run


@dataclass(frozen=True)
class Axes:
    """Where a picture's points stand in a record, and how its axes are drawn."""

    field: str
    first: str  # what stands at both ends of the axis across; {} is the last number there
    last: str
    upright: tuple[float, float] | None = None  # ends of the upright axis; None: as the values ask for


@dataclass(frozen=True)
class Panel:
    """One diagram: a line a method."""

    title: str
    lines: dict[str, Points]  # by label
    axes: Axes
    last: float  # number across


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


def svg_retention(records: Sequence[Record]) -> str | None:
    """The share of facts that hold by their place in the run, right after their batch and at its end; None: no such run."""

    def share(name: str) -> Callable[[Sequence[Record]], Points]:
        return lambda bins: [((b["first"] - 1 + b["last"]) / 2, 100 * b[name]) for b in bins if b.get(name) is not None]

    if not any(r.get("retention") for r in records):
        return None
    measured = {
        "hold right after their batch, %": share("right_after"),
        "hold at the end of the run, %": share("after"),
    }
    return _svg(records, measured, "Facts that hold, by their place in the run", _BY_PLACE)


_OVER_EDITS = Axes("curve", "0", "{:g} edits")
_BY_PLACE = Axes("retention", "oldest", "newest of {:g} facts", (0.0, 100.0))


def _svg(records: Sequence[Record], measured: Measured, about: str, axes: Axes = _OVER_EDITS) -> str:
    """A row of panels for each model, dataset and kind of run; below them the methods' colours."""
    rows = _rows([r for r in records if r.get(axes.field)])
    kinds = _kinds(records)
    high, width = 210, (charts.WIDTH - 20) / len(measured)
    out = _opening(high * len(rows) + 30, kinds, about)
    for row, (title, members) in enumerate(rows.items()):
        out.append(charts.text(20, row * high + 16, str(title), "start"))
        for column, (name, points) in enumerate(measured.items()):
            own = {label: [points(r[axes.field]) for r in members if r["label"] == label] for label in kinds}
            lines = {label: _averaged(curves) for label, curves in own.items()}
            box = (column * width + 60, row * high + 50, (column + 1) * width - 6, (row + 1) * high - 20)
            last = title.run.edits if axes.upright else max((x for line in lines.values() for x, _ in line), default=1)
            out += _panel(Panel(name, lines, axes, last or 1), list(kinds.values()), box)
    if not rows:
        out.append(charts.text(20, 24, "no run has a curve yet", "start"))
    out += _legend(kinds, high * len(rows) + 24, lambda x, y, kind: _polyline([(x, y), (x + 24, y)], kind))
    return "\n".join([*out, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Row:
    """Whose panels stand beside each other."""

    model: str
    dataset: str
    run: RunKind

    def __str__(self) -> str:
        return f"{self.model} · {self.dataset} · {self.run}"


def _rows(records: Sequence[Record]) -> dict[Row, list[Record]]:
    out: dict[Row, list[Record]] = {}
    for r in records:
        out.setdefault(Row(r["model"], r["dataset"], RunKind(r["edits"], r["batch_size"])), []).append(r)
    return out


def _kinds(records: Sequence[Record]) -> dict[str, Kind]:
    """Each method's stroke by its label, the same in every picture."""
    labels = dict.fromkeys(r["label"] for r in records)
    count = len(COLOURS)
    return {label: Kind(COLOURS[i % count], DASHES[i // count % len(DASHES)]) for i, label in enumerate(labels)}


def _opening(height: float, kinds: Mapping[str, Kind], about: str) -> list[str]:
    """``height``: without the legend's."""
    height += 22 * (-(-len(kinds) // 3))
    return [charts.opening(height, about, _NAME_SPACE), f"<style>{_STYLE}</style>"]


def _legend(kinds: Mapping[str, Kind], top: float, sample: Callable[[float, float, Kind], str]) -> list[str]:
    """Three labels a row, each with a ``sample`` of how its method is drawn, 24 units wide."""
    out = []
    for i, (label, kind) in enumerate(kinds.items()):
        x, y = 20 + (i % 3) * 235, top + 22 * (i // 3)
        out.append(sample(x, y - 4, kind))
        out.append(charts.text(x + 30, y, label, "start", "small"))
    return out


def _polyline(points: Sequence[tuple[float, float]], kind: Kind, name: str = "curve") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{name}" {kind} points="{path}"/>'


def _averaged(curves: Sequence[Points]) -> Points:
    """The mean over seeds at each number of edits."""
    at: dict[float, list[float]] = {}
    for x, y in (p for curve in curves for p in curve):
        at.setdefault(x, []).append(y)
    return [(x, fmean(ys)) for x, ys in sorted(at.items())]


def _panel(panel: Panel, kinds: Sequence[Kind], box: tuple[float, float, float, float]) -> list[str]:
    """One diagram inside (left, top, right, bottom); the scale is logarithmic where values span more than tenfold."""
    left, top, right, bottom = box
    values = [y for points in panel.lines.values() for _, y in points]
    low, high = panel.axes.upright or ((min(values), max(values)) if values else (0.0, 1.0))
    log = low > 0 and high > 10 * low
    scale: Callable[[float], float] = math.log10 if log else lambda v: v
    if high - low < 0.02 * abs(high):  # a flat line shall look flat
        low, high = low - 0.01 * abs(high), high + 0.01 * abs(high)
    span = scale(high) - scale(low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / panel.last, bottom - (bottom - top) * (scale(y) - scale(low)) / span

    out = [charts.text(left, top - 12, panel.title + (" (log)" if log else ""), "start", "small")]
    for share in (0.0, 0.5, 1.0):
        value = scale(low) + share * span
        y = bottom - (bottom - top) * share
        out.append(charts.line(left, y, right, y, "grid"))
        out.append(charts.text(left - 6, y + 4, f"{10**value if log else value:.4g}", "end", "small"))
    out.append(charts.text(left, bottom + 14, panel.axes.first, "middle", "small"))
    out.append(charts.text(right, bottom + 14, panel.axes.last.format(panel.last), "end", "small"))
    lines = [
        _polyline([at(x, y) for x, y in points], kind)
        for points, kind in zip(panel.lines.values(), kinds, strict=True)
        if len(points) > 1
    ]
    return out + lines[::-1]  # the first method on top: curves that do not move lie over each other


# The frontier.


@dataclass(frozen=True)
class Share:
    """In percent, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    """One method in a panel."""

    label: str
    x: Share
    y: Share


def svg_frontier(records: Sequence[Record]) -> str | None:
    """Generalization against what stayed of each group of prompts, a dot a method; None where no record has such groups."""
    grouped = [r for r in records if r["status"] == "done" and any(_kept(r, group) for group in KEPT)]
    rows = {row: _dots(members) for row, members in _rows(grouped).items()}
    rows = {row: panels for row, panels in rows.items() if any(dots for _, _, dots in panels)}
    if not rows:
        return None
    kinds = _kinds(records)
    high, width = 356, (charts.WIDTH - 20) / len(KEPT)
    out = _opening(high * len(rows) + 56, kinds, "Generalization against what stayed")
    for row, (title, panels) in enumerate(rows.items()):
        out.append(charts.text(20, row * high + 16, str(title), "start"))
        for column, (across, up, dots) in enumerate(panels):
            box = (column * width + 60, row * high + 50, (column + 1) * width - 10, (row + 1) * high - 50)
            out += [*_axes(across, up, box), *_scatter(dots, kinds, box)]
    out.append(charts.text(20, high * len(rows) + 18, _FRONTIER_HELP, "start", "small"))
    out += _legend(kinds, high * len(rows) + 46, lambda x, y, kind: _dot(x + 12, y, kind))
    return "\n".join([*out, "</svg>"]) + "\n"


def _kept(record: Record, group: str) -> Record | None:
    return _finite(record.get("groups", {}).get(group))


def _finite(measure: Record | None) -> Record | None:
    return measure if measure and measure["value"] is not None else None


def _dots(members: Sequence[Record]) -> list[tuple[str, str, list[Dot]]]:
    """The panels of a row: titles of both axes, and a dot for each method that was asked for both shares.

    All methods are shown by the same generalization: over known wordings unless a record lacks it.
    """
    if all(_finite(r.get("known")) for r in members):
        across, carried = "generalization over known wordings (QA), %", [_finite(r["known"]) for r in members]
    else:
        across, carried = "generalization, %", [_finite(r["scores"].get("generalization")) for r in members]
    out = []
    for group in KEPT:
        pairs: dict[str, list[tuple[Record, Record]]] = {}
        for r, x in zip(members, carried, strict=True):
            if x and (y := _kept(r, group)):
                pairs.setdefault(r["label"], []).append((x, y))
        dots = [Dot(label, _share([x for x, _ in both]), _share([y for _, y in both])) for label, both in pairs.items()]
        out.append((across, f"{shown(group)} kept (QA), %", dots))
    return out


def _share(measures: Sequence[Record]) -> Share:
    """One seed: the value and its interval; several: their mean and its interval, as in the tables."""
    value, half = over_seeds([m["value"] for m in measures])
    low, high = value - half, value + half
    if len(measures) == 1:
        ends = measures[0].get("low"), measures[0].get("high")
        low, high = (value if end is None else end for end in ends)
    # Student's t knows nothing of the ends of a share.
    return Share(100 * value, 100 * max(low, 0.0), 100 * min(high, 1.0))


def _axes(across: str, up: str, box: tuple[float, float, float, float]) -> list[str]:
    """Both axes from 0 to 100 inside (left, top, right, bottom)."""
    left, top, right, bottom = box
    out = [charts.text(left, top - 12, up, "start", "small"), charts.text(right, bottom + 32, across, "end", "small")]
    for tick in (0, 25, 50, 75, 100):
        x, y = _at(tick, tick, box)
        out += [charts.line(left, y, right, y, "grid"), charts.line(x, top, x, bottom, "grid")]
        out += [charts.text(left - 6, y + 4, f"{tick}", "end", "small")]
        out += [charts.text(x, bottom + 15, f"{tick}", "middle", "small")]
    return out


def _at(x: float, y: float, box: tuple[float, float, float, float]) -> tuple[float, float]:
    left, top, right, bottom = box
    return left + (right - left) * x / 100, bottom - (bottom - top) * y / 100


def _scatter(dots: Sequence[Dot], kinds: Mapping[str, Kind], box: tuple[float, float, float, float]) -> list[str]:
    """Dots above all whiskers, the first method on top; those in one place lie around each other as rings."""
    if not dots:
        return [charts.text(*_at(50, 62.5, box), "not asked", "middle", "small")]  # between two lines of the grid
    whiskers, marks = [], []
    places = [_at(d.x.value, d.y.value, box) for d in dots]
    for i, (d, (x, y)) in enumerate(zip(dots, places, strict=True)):
        for ends in ((d.x.low, d.y.value, d.x.high, d.y.value), (d.x.value, d.y.low, d.x.value, d.y.high)):
            whiskers.append(_polyline([_at(*ends[:2], box), _at(*ends[2:], box)], kinds[d.label], "whisker"))
        title = f"{d.label}: {d.x.value:.1f}, {d.y.value:.1f}"
        marks.append(_dot(x, y, kinds[d.label], 4 + 2 * places[:i].count((x, y)), title))
    return whiskers[::-1] + marks[::-1]


def _dot(x: float, y: float, kind: Kind, radius: float = 4, title: str = "") -> str:
    """Filled for the first methods, a ring for those that have to share a colour; ``title`` is shown under the pointer."""
    fill = "#fff" if kind.dash else kind.colour
    inner = f"<title>{markup(title)}</title>" if title else ""
    return f'<circle class="dot" {kind} fill="{fill}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inner}</circle>'
