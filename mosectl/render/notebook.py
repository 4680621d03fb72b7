"""Results as Jupyter shows them: small tables in the notebook's own colours, no script, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mosectl.editing.edit import EditResult
from mosectl.facts.probe import not_counted
from mosectl.measure.bootstrap import interval_text, value_text
from mosectl.measure.evaluate import Evaluation
from mosectl.measure.metrics import Metric
from mosectl.measure.probes import ProbeAnswer, surprising
from mosectl.patch.file import Patch
from mosectl.render import scores
from mosectl.render.terminal import place
from mosectl.text.shown import answer_cell, counted, markup

ROWS, PROBES = 20, 10  # of a table
LONGEST = 300  # characters of a cell
_PLAIN = "tex2jax_ignore mathjax_ignore"  # "$" in a fact is no mathematics: what MathJax makes may hold links that run
_LEFT, _RIGHT = "text-align:left;white-space:pre-wrap", "text-align:right;white-space:nowrap"
_FACTS = ("prompt", "before", "after", ">P(new) before", ">P(new) after", "")
_METRICS = ("metric", ">before", ">right after", ">after", ">95 % interval", ">prompts")


def html(value: EditResult | Patch | Evaluation) -> str:
    """The first rows of what is in it; the rest is in its attributes."""
    parts = (
        _edit(value) if isinstance(value, EditResult) else _patch(value) if isinstance(value, Patch) else _eval(value)
    )
    return f'<div class="{_PLAIN}">{"".join(parts)}</div>'


def _edit(result: EditResult) -> Iterator[str]:
    patch, reached = result.patch, sum(r.status in ("changed", "already known") for r in result.facts)
    yield _line(f"{patch.method}: {reached} of {counted(len(result.facts), 'fact')} reached", f"patch {patch.id[:12]}")
    rows = [scores.of_fact(r.fact.prompt, r, r.status) for r in result.facts]
    yield _table("Answers", _FACTS, rows, ROWS, ".facts")
    yield _table("Scores", scores.COLUMNS, [*scores.of_edit(result.scores, result.shares)], ROWS, ".shares")
    yield from (_line("", told) for told in not_counted(result.not_counted))
    yield _changed(result.probes, "What else changed")
    drift = max((s.spectrum_drift for s in result.stability), default=0.0)
    told = [f"largest drift of a singular value {drift:.1e}", f"{sum(result.seconds.values()):.0f} s"]
    yield _line("", *([f"stopped early: {result.stopped}"] if result.stopped else []), *told)


def _patch(patch: Patch) -> Iterator[str]:
    about = [
        ("method", f"{patch.method} ({patch.side}), seed {patch.seed}"),
        ("base model", patch.model + (f" @ {patch.revision}" if patch.revision else "")),
        ("changes", ", ".join(map(place, patch.changes))),
        ("on top of", ", ".join(p[:12] for p in patch.parents) or "the base model"),
    ]
    if facts_from := patch.options.get("facts"):
        about.append(("facts from", " ".join(facts_from)))
    yield _table(f"Patch {patch.id[:12]}", ("", ""), about, ROWS)
    rows = [scores.of_fact(f.prompt, f, f.status) for f in patch.facts]
    yield _table(f"Facts ({len(rows)})", _FACTS, rows, ROWS, ".facts")


def _eval(found: Evaluation) -> Iterator[str]:
    held = sum(f.holds for f in found.facts)
    before = f"before: {found.subject.base}" if found.subject.base else "no model from before"
    yield _line(f"{found.subject.name}: {held} of {counted(len(found.facts), 'fact')} hold (generation)", before)
    for i, (name, about) in enumerate(found.settings["protocols"].items()):
        table = _table("", _METRICS, [_metric(m) for m in found.metrics if m.protocol == name], 2 * ROWS, ".metrics")
        yield _folded(f"Protocol {name}: {about}", table, shut=bool(i))
    texts = [
        (t.name, value_text(t.before, ".3f"), value_text(t.after, ".3f"), interval_text(t.after, ".3f"), t.about)
        for t in found.texts
    ]
    yield _table("Text", ("metric", ">before", ">after", ">95 % interval", "of what"), texts, ROWS)
    lost = [
        (f.prompt, f.target_new, answer_cell(f.right_after), answer_cell(f.after)) for f in found.facts if not f.holds
    ]
    columns = ("prompt", "new object", "right after", "after")
    yield _table("Facts that do not hold (generation)", columns, lost, PROBES, ".facts")
    yield _changed(found.probes, "What else changed" if found.subject.base else "Probes without the expected answer")
    if found.notes:
        notes = "".join(f"<li>{markup(note)}</li>" for note in found.notes)
        yield _folded(counted(len(found.notes), "note"), f"<ul>{notes}</ul>", shut=True)


def _metric(m: Metric) -> tuple[str, ...]:
    values = (value_text(x, ".1%") for x in (m.before, m.right_after, m.after))
    return m.label, *values, interval_text(m.after, ".1%"), str(m.asked)


def _changed(probes: Sequence[ProbeAnswer], title: str) -> str:
    found = surprising(probes)
    if probes and not found:
        return _line("", f"{title}: nothing, at {counted(len(probes), 'probe')}")
    return _table(title, scores.CHANGED, scores.of_probes(found), PROBES, ".probes")


def _line(head: str, *rest: str) -> str:
    strong = f"<b>{markup(head)}</b>" if head else ""
    return f"<p>{'; '.join([*([strong] if strong else []), *map(markup, rest)])}</p>"


def _folded(summary: str, content: str, *, shut: bool) -> str:
    return f"<details{'' if shut else ' open'}><summary>{markup(summary)}</summary>{content}</details>"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], most: int, rest: str = "") -> str:
    """A table, or nothing without rows; columns named ">x" are numbers, aligned right. ``rest``: the attribute with all."""
    if not rows:
        return ""
    sides = [_RIGHT if column.startswith(">") else _LEFT for column in columns]
    top = f"<thead>{_row('th', [c.lstrip('>') for c in columns], sides)}</thead>" if any(columns) else ""
    body = "".join(_row("td", row, sides) for row in rows[:most])
    more = _line("", f"… and {len(rows) - most:,} more: {rest}") if len(rows) > most else ""
    caption = f"<p><b>{markup(title)}</b></p>" if title else ""
    return f"{caption}<table>{top}<tbody>{body}</tbody></table>{more}"


def _row(kind: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    cut = (text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in cells)
    return f"<tr>{''.join(f'<{kind} style={s!r}>{markup(c)}</{kind}>' for c, s in zip(cut, sides, strict=True))}</tr>"
