"""The two pictures of an evaluation: shares with their intervals, and what is left of the facts in order of the edit.

As SVG by hand for the web page (colours are the page's), and as one PNG by matplotlib where that is installed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mosectl.errors import UsageError
from mosectl.text.shown import markup, printable

if TYPE_CHECKING:
    from mosectl.measure.evaluate import Evaluation
    from mosectl.measure.metrics import Metric
    from mosectl.measure.retention import Bin


WIDTH = 720  # SVG user units
LABEL = 42  # characters beside a bar


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


def shown(evaluation: Evaluation) -> list[Metric]:
    """The metrics that have a value."""
    return [m for m in evaluation.metrics if m.after is not None and math.isfinite(m.after.value)]


def svg_shares(metrics: Sequence[Metric]) -> str:
    """A bar a metric with its interval as a whisker; a thin mark where it was before."""
    left, right, row = 290, 650, 26
    height = row * len(metrics) + 30

    def x(share: float) -> float:
        return left + (right - left) * _inside(share)

    out = [opening(height, "Shares after the edit, with 95 % intervals")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(line(x(tick), 4, x(tick), height - 24, "grid"))
        out.append(text(x(tick), height - 8, f"{tick:.0%}", "middle", "small"))
    for i, m in enumerate(metrics):
        assert m.after is not None
        y = 10 + row * i
        label = f"{m.protocol} · {m.label.strip()}"
        out.append(text(left - 10, y + 13, label if len(label) <= LABEL else f"{label[: LABEL - 1]}…", "end"))
        width = x(m.after.value) - left
        out.append(f'<rect class="bar" x="{left}" y="{y + 2}" width="{width:.1f}" height="14" rx="2"/>')
        out.append(line(x(m.after.low), y + 9, x(m.after.high), y + 9, "whisker"))
        out += [line(x(end), y + 5, x(end), y + 13, "whisker") for end in (m.after.low, m.after.high)]
        if m.before is not None:
            out.append(line(x(m.before.value), y, x(m.before.value), y + 18, "before"))
        out.append(text(right + 10, y + 13, f"{m.after.value:.1%}", "start"))
    return "\n".join([*out, "</svg>"])


def svg_retention(bins: Sequence[Bin]) -> str:
    """The share of facts that hold, by place in the file: now, and dashed as recorded right after the edit."""
    left, right, top, bottom = 50, 700, 12, 190
    last = bins[-1].last

    def at(b: Bin, share: float) -> tuple[float, float]:
        middle = (b.first + b.last) / 2
        return left + (right - left) * (middle - 0.5) / last, bottom - (bottom - top) * _inside(share)

    out = [opening(236, "Share of facts that still hold, in order of the edit")]
    for tick in (0, 0.5, 1):
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

    metrics = shown(evaluation)
    figure = Figure(figsize=(9, 3.2 + 0.3 * len(metrics)), layout="constrained")
    bars, curve = figure.subplots(2, 1, height_ratios=(max(2.0, 0.3 * len(metrics)), 2.2))
    _draw_shares(bars, metrics)
    _draw_retention(curve, evaluation.retention)
    figure.suptitle(printable(f"mosectl eval: {evaluation.subject.name}"), fontsize=11, parse_math=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def _draw_shares(axes: Any, metrics: Sequence[Metric]) -> None:
    rows = list(range(len(metrics)))
    found = [m.after for m in metrics if m.after is not None]
    # An interval may, rarely, leave the value itself out; a whisker cannot have a negative length.
    ends = [[max(0.0, a.value - a.low) for a in found], [max(0.0, a.high - a.value) for a in found]]
    axes.barh(rows, [a.value for a in found], color="#4c78a8", height=0.6, xerr=ends, ecolor="black", capsize=2)
    before = [(m.before.value, row) for row, m in zip(rows, metrics, strict=True) if m.before is not None]
    if before:
        axes.scatter(*zip(*before, strict=True), marker="|", s=120, color="#e45756", zorder=3)
    axes.set_yticks(rows, [f"{m.protocol} · {m.label.strip()}" for m in metrics], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-0.01, 1.02)
    axes.set_xlabel("share after the edit, 95 % interval" + ("; red mark: before" if before else ""), fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_retention(axes: Any, bins: Sequence[Bin]) -> None:
    then = [b for b in bins if b.right_after is not None]
    if then:
        middle = [(b.first + b.last) / 2 for b in then]
        axes.plot(middle, [b.right_after for b in then], "--o", color="#9d9da1", markersize=4, label="right after")
    middle = [(b.first + b.last) / 2 for b in bins]
    axes.plot(middle, [b.after for b in bins], "-o", color="#4c78a8", markersize=4, label="now")
    axes.set_ylim(-0.03, 1.05)
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
