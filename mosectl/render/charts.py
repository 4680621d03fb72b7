"""The two pictures of an evaluation: shares with their intervals, and what is left of the facts in order of the edit.

As SVG by hand for the web page (colours are the page's), and as one PNG by matplotlib where that is installed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mosectl.errors import UsageError
from mosectl.render.scores import retained
from mosectl.text.shown import markup, printable

if TYPE_CHECKING:
    from mosectl.measure.bootstrap import Measure
    from mosectl.measure.evaluate import Evaluation
    from mosectl.measure.metrics import Metric
    from mosectl.measure.retention import Bin


WIDTH = 720  # SVG user units
LABEL = 42  # characters beside a share
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_matplotlib(option: str = "--png") -> None:
    """Find out before the work, not after it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise UsageError(
            f"{option} needs matplotlib",
            fix='run: pip install "mosectl[plot]"' + ("   (--html needs nothing)" if option == "--png" else ""),
        ) from e


@dataclass(frozen=True)
class Dot:
    """One share after the edit, as the first protocol that asks for it judges it, and as the others do."""

    label: str
    protocol: str
    before: float | None
    after: Measure
    lowest: float  # of all protocols
    highest: float


def shares(metrics: Sequence[Metric]) -> list[Dot]:
    """The shares that have a value, each once: protocols often differ by little, and are in the table."""
    found: dict[tuple[str, str, bool], list[tuple[Metric, Measure]]] = {}
    for m in metrics:
        if m.after is not None and math.isfinite(m.after.value):
            found.setdefault((m.name, m.group, m.own), []).append((m, m.after))
    return [_dot(judged, first=next(iter(found.values()))[0][0].protocol) for judged in found.values()]


def _dot(judged: Sequence[tuple[Metric, Measure]], first: str) -> Dot:
    m, after = judged[0]
    label = f"{m.name} · {m.label.strip()}" if m.group else m.name
    if m.protocol != first:
        label += f" ({m.protocol})"
    values = [found.value for _, found in judged]
    return Dot(label, m.protocol, m.before.value if m.before else None, after, min(values), max(values))


def shares_about(dots: Sequence[Dot]) -> str:
    """What stands below the picture of these shares."""
    said = [f"Dots: after the edit, by the protocol {dots[0].protocol}, with 95 % intervals."]
    if any(d.highest > d.lowest for d in dots):
        said.append("Bands, and numbers in brackets: from the lowest to the highest share by any protocol.")
    if any(d.before is not None for d in dots):
        said.append("Red marks: before.")
    return " ".join(said)


def svg_shares(dots: Sequence[Dot]) -> str:
    """A dot a share, its interval as a whisker, behind it a band of what all protocols say; a mark where it was before."""
    left, right, row = 290, 540, 28
    height = row * len(dots) + 30

    def x(share: float) -> float:
        return left + (right - left) * _inside(share)

    out = [opening(height, "Shares after the edit, with 95 % intervals")]
    for tick in TICKS:
        out.append(line(x(tick), 4, x(tick), height - 24, "grid"))
        out.append(text(x(tick), height - 8, f"{tick:.0%}", "middle", "small"))
    for i, d in enumerate(dots):
        y = 19 + row * i
        out.append(text(left - 12, y + 4, d.label if len(d.label) <= LABEL else f"{d.label[: LABEL - 1]}…", "end"))
        ends, told = (x(d.lowest), x(d.highest)), f"{d.after.value:.1%}"
        if d.highest > d.lowest:
            width = ends[1] - ends[0]
            out.append(f'<rect class="band" x="{ends[0]:.1f}" y="{y - 8}" width="{width:.1f}" height="16" rx="2"/>')
            told += f" ({100 * d.lowest:.1f} – {d.highest:.1%})"
        out.append(line(x(d.after.low), y, x(d.after.high), y, "whisker"))
        out += [line(x(end), y - 4, x(end), y + 4, "whisker") for end in (d.after.low, d.after.high)]
        if d.before is not None:
            out.append(line(x(d.before), y - 9, x(d.before), y + 9, "before"))
        out.append(f'<circle class="dot" cx="{x(d.after.value):.1f}" cy="{y}" r="5"/>')
        out.append(text(right + 12, y + 4, told, "start"))
    return "\n".join([*out, "</svg>"])


def svg_retention(bins: Sequence[Bin]) -> str:
    """The share of facts that hold, by place in the file: now, and dashed as recorded right after the edit."""
    left, right, top, bottom = 50, 700, 12, 190
    last = bins[-1].last

    def at(b: Bin, share: float) -> tuple[float, float]:
        middle = (b.first + b.last) / 2
        return left + (right - left) * (middle - 0.5) / last, bottom - (bottom - top) * _inside(share)

    out = [opening(236, "Share of facts that still hold, in order of the edit")]
    for tick in TICKS[::2]:
        y = bottom - (bottom - top) * tick
        out += [line(left, y, right, y, "grid"), text(left - 8, y + 4, f"{tick:.0%}", "end", "small")]
    out += [text(left, 208, "fact 1", "start", "small"), text(right, 208, f"fact {last}", "end", "small")]
    lines = {
        "then": [at(b, b.right_after) for b in bins if b.right_after is not None],
        "now": [at(b, b.after) for b in bins],
    }
    for kind, points in lines.items():
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        out.append(f'<polyline class="{kind}" points="{path}"/>')
        out += [f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in points]
    out += [line(left, 224, left + 24, 224, "now"), text(left + 30, 228, "now", "start", "small")]
    if lines["then"]:
        out += [line(left + 90, 224, left + 114, 224, "then"), text(left + 120, 228, "right after", "start", "small")]
    return "\n".join([*out, "</svg>"])


def _inside(share: float) -> float:
    """A share as it can be drawn, whatever a file says."""
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def opening(height: float, label: str, name: str = "") -> str:
    """``name``: the name space, which a picture in a file of its own needs and one inside a page does not."""
    return f'<svg {name}viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{markup(label)}">'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """An SVG line from (x1, y1) to (x2, y2); ``kind`` is its CSS class."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, anchor: str, kind: str = "label") -> str:
    """An SVG text with its markup escaped; ``kind`` is its CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{markup(content)}</text>'


def png(evaluation: Evaluation) -> bytes:
    """Both pictures in one PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    dots, bins = shares(evaluation.metrics), retained(evaluation)
    upper, lower = max(2.0, 0.3 * len(dots)), 2.2 if bins else 0.0
    figure = Figure(figsize=(9, 1.0 + upper + lower), layout="constrained")
    if bins:
        above, below = figure.subplots(2, 1, height_ratios=(upper, lower))
        _draw_retention(below, bins)
    else:
        above = figure.subplots()
    _draw_shares(above, dots)
    figure.suptitle(printable(f"mosectl eval: {evaluation.subject.name}"), fontsize=11, parse_math=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def _draw_shares(axes: Any, dots: Sequence[Dot]) -> None:
    rows, values = list(range(len(dots))), [d.after.value for d in dots]
    # An interval may, rarely, leave the value itself out; a whisker cannot have a negative length.
    ends = [
        [max(0.0, d.after.value - d.after.low) for d in dots],
        [max(0.0, d.after.high - d.after.value) for d in dots],
    ]
    axes.barh(rows, [d.highest - d.lowest for d in dots], left=[d.lowest for d in dots], color="#d5d9e0", height=0.6)
    axes.errorbar(values, rows, xerr=ends, fmt="o", color="#4c78a8", ecolor="black", capsize=2, markersize=5)
    before = [(d.before, row) for row, d in zip(rows, dots, strict=True) if d.before is not None]
    if before:
        axes.scatter(*zip(*before, strict=True), marker="|", s=120, color="#e45756", zorder=3)
    axes.set_yticks(rows, [d.label for d in dots], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-0.01, 1.02)
    axes.set_xticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
    axes.set_xlabel("\n".join(shares_about(dots).split(". ")) if dots else "", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_retention(axes: Any, bins: Sequence[Bin]) -> None:
    then = [b for b in bins if b.right_after is not None]
    if then:
        middle = [(b.first + b.last) / 2 for b in then]
        axes.plot(middle, [b.right_after for b in then], "--o", color="#9d9da1", markersize=4, label="right after")
    middle = [(b.first + b.last) / 2 for b in bins]
    axes.plot(middle, [b.after for b in bins], "-o", color="#4c78a8", markersize=4, label="now")
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
    axes.set_xlabel(f"the {bins[-1].last} facts in order of the edit", fontsize=8)
    axes.set_ylabel("share that holds\n(generation)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(loc="lower left", fontsize=8)


def png_training(history: Sequence[Mapping[str, float]]) -> bytes:
    """Losses over the steps of an editor's training.

    Raises:
        UsageError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [h["step"] for h in history]
    names = {"validation": "all, validation", "training": "all, training", "edit": "new object",
             "generalization": "in other words", "locality": "elsewhere (KL)"}  # fmt: skip
    for key, name in names.items():
        axes.plot(
            steps,
            [h.get(key, float("nan")) for h in history],
            label=name,
            linewidth=2.5 if key == "validation" else 1.2,
        )
    axes.set(xlabel="step", ylabel="nats", title="Training of an editor")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
