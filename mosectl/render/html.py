"""An evaluation as one HTML file: no script, nothing fetched, readable in light and dark, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mosectl.measure.bootstrap import interval_text, value_text
from mosectl.measure.lm_harness import COLUMNS, table
from mosectl.measure.probes import surprising
from mosectl.render import scores
from mosectl.render.charts import shown, svg_retention, svg_shares
from mosectl.text.shown import counted, markup

if TYPE_CHECKING:
    from mosectl.measure.evaluate import EvaluatedFact, Evaluation


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --paper: #fff; --soft: #667; --line: #d8dbe0; --accent: #4c78a8;
  --mark: #c8403f; --good: #1a7f45; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #15181c; --soft: #9aa3ad; --line: #333941;
  --accent: #6f9fd0; --mark: #ff8a80; --good: #6fcf97; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.soft, dd { color: var(--soft); } .yes { color: var(--good); } .no { color: var(--mark); }
.wide { overflow-x: auto; } summary { cursor: pointer; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
svg { width: 100%; max-width: 46rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg text.small { fill: var(--soft); font-size: 11px; }
.bar { fill: var(--accent); } .whisker { stroke: var(--ink); stroke-width: 1.5; } .grid { stroke: var(--line); }
line.before { stroke: var(--mark); stroke-width: 2.5; }
line.now, polyline.now { stroke: var(--accent); stroke-width: 2.5; fill: none; } circle.now { fill: var(--accent); }
line.then, polyline.then { stroke: var(--soft); stroke-width: 2; stroke-dasharray: 5 4; fill: none; }
circle.then { fill: var(--soft); }
"""


def render(evaluation: Evaluation) -> str:
    """The whole page."""
    e, subject = evaluation, evaluation.subject
    held = sum(f.holds for f in e.facts)
    intro = [
        f"{held} of {len(e.facts)} facts hold (protocol generation).",
        f"Before: {subject.base}." if subject.base else "",
        "Patches: " + ", ".join(p[:12] for p in subject.patches) + "." if subject.patches else "",
    ]
    settings = ", ".join(f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in e.settings.items())
    title = markup(f"mosectl eval: {subject.name}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>{markup(' '.join(filter(None, intro)))}</p>",
        "".join(f'<p class="soft">Note: {markup(note)}.</p>' for note in e.notes),
        _metrics(e),
        "<h2>Shares</h2>" + svg_shares(shown(e)),
        '<p class="soft">Bars: after the edit, with 95 % intervals. Red marks: before.</p>',
        "<h2>Retention</h2>" + svg_retention(e.retention),
        '<p class="soft">Facts in the order of the file; the share that holds under generation.</p>',
        _cohorts(e),
        _facts(e.facts),
        _probes(e),
        _definitions(e),
        f'<p class="soft">{markup(settings)}</p></body></html>',
    ]
    return "\n".join(parts) + "\n"


def _metrics(e: Evaluation) -> str:
    rows = [
        (m.protocol, m.label.strip(), *(value_text(x, ".1%") for x in (m.before, m.right_after, m.after)),
         interval_text(m.after, ".1%"), str(m.asked))
        for m in e.metrics
    ]  # fmt: skip
    head = ("protocol", "metric", ">before", ">right after", ">after", ">95 % interval", ">prompts")
    texts = [
        (t.name, t.about, *(value_text(x, ".3f") for x in (t.before, t.after)), interval_text(t.after, ".3f"))
        for t in e.texts
    ]
    parts = [
        "<h2>Metrics</h2>" + _table(head, rows),
        "<h2>Text</h2>" + _table(("metric", "of what", ">before", ">after", ">95 % interval"), texts),
    ]
    if e.next_tokens:
        parts.append(f"<h2>Next token</h2>{_table(scores.NEXT, scores.of_next(e.next_tokens))}")
        parts.append(f'<p class="soft">{markup(scores.NEXT_TITLE)}.</p>')
    if e.abilities:
        about = "By lm-evaluation-harness; ±: its standard error; interval: of the change, over the same examples."
        parts.append(f'<h2>Abilities</h2>{_table(COLUMNS, table(e.abilities))}<p class="soft">{about}</p>')
    return "\n".join(parts)


def _cohorts(e: Evaluation) -> str:
    if not e.cohorts:
        return ""
    rows = _table(scores.COHORTS, scores.of_cohorts(e.cohorts))
    return f'<h3>{markup(scores.COHORTS_TITLE)}</h3>{rows}<p class="soft">{markup(scores.COHORTS_HELP)}.</p>'


def _facts(facts: Sequence[EvaluatedFact]) -> str:
    body = []
    for f in facts:
        mark = '<span class="yes">holds</span>' if f.holds else '<span class="no">does not hold</span>'
        chance = "–" if f.probability_before is None else f"{f.probability_before:.3f}"
        cells = (f.prompt, f.target_new, f.before or "–", f.right_after or "–", f.after)
        body.append(
            "<tr>" + "".join(f"<td>{markup(c)}</td>" for c in cells)
            + f'<td class="n">{chance} → {f.probability_after:.3f}</td><td>{mark}</td></tr>'
        )  # fmt: skip
    head = "".join(f"<th>{h}</th>" for h in ("prompt", "new object", "before", "right after", "after", "P(new)", ""))
    return f'<h2>Facts</h2><div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _probes(e: Evaluation) -> str:
    """The probes that changed and should not have, or the other way round; folded, as they may be many."""
    if not e.probes:
        return ""
    found = surprising(e.probes)
    heading = f"<h2>{'What else changed' if e.subject.base else 'Probes without the expected answer'}</h2>"
    if not found:
        return f"{heading}<p>Nothing, at {counted(len(e.probes), 'probe')}.</p>"
    rows = [(str(p.fact), *row, p.expected or "–") for p, row in zip(found, scores.of_probes(found), strict=True)]
    shown_rows = _table((">fact", *scores.CHANGED, "expected"), rows)
    told = f"{len(found):,} of {counted(len(e.probes), 'probe')}"
    return f"{heading}<details><summary>{told}, the most surprising first</summary>{shown_rows}</details>"


def _definitions(e: Evaluation) -> str:
    from mosectl.measure.protocols import PROTOCOLS

    used = [PROTOCOLS[name] for name in e.settings["protocols"]]
    items = "".join(f"<dt>{markup(p.name)}</dt><dd>{markup(p.about)} ({markup(p.source)})</dd>" for p in used)
    how = (
        f"Intervals: percentile bootstrap over facts, {e.settings['resamples']} resamples, seed {e.settings['seed']}; "
        "Right after: what the patches recorded when a fact's own batch was done."
    )
    return f"<h2>Definitions</h2><dl>{items}</dl><p>{markup(how)}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns named ">x" are numbers, aligned right."""
    kinds = [' class="n"' if h.startswith(">") else "" for h in head]
    top = "".join(f"<th{k}>{markup(h.lstrip('>'))}</th>" for h, k in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{markup(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
