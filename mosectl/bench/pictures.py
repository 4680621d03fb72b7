"""A bench's pictures from its records, as SVG by hand: MOSE's Figures 2 (norm and condition number) and 3 (abilities)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mosectl.bench.config import RunKind
from mosectl.bench.runner import Record
from mosectl.render import charts

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d", "#d67195", "#79706e", "#bab0ac")
DASHES = ("", "6 3", "2 3")  # for more methods than colours
_NAME_SPACE = 'xmlns="http://www.w3.org/2000/svg" '
_STYLE = """svg { background: #fff; } text { fill: #1c1f24; font: 13px system-ui, sans-serif; }
text.small { fill: #667; font-size: 11px; } .grid { stroke: #d8dbe0; } .curve { fill: none; stroke-width: 1.8; }"""

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
