"""What the page of an evaluation says, section by section."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mosectl.measure.bootstrap import interval_text, value_text
from mosectl.measure.probes import surprising
from mosectl.render import page, scores
from mosectl.render.charts import shares, shares_about, svg_retention, svg_shares
from mosectl.render.page import DASH, Cell, Mark, Page, Picture, Section, Table, Terms, Words, firm, table
from mosectl.text.shown import answer_cell, counted

if TYPE_CHECKING:
    from mosectl.measure.evaluate import EvaluatedFact, Evaluation
    from mosectl.measure.retention import Cohort

_ROOTED = re.compile(r"[\\/~]|[A-Za-z]:[\\/]")  # an absolute path, and one of a home
METRICS = ("protocol", "metric", ">before", ">right after", ">after", ">95 % interval", ">prompts")
FACTS = ("~prompt", "new object", "before", "right after", "after", ">P(new) before", ">P(new) after", "!verdict")


def render(evaluation: Evaluation) -> str:
    """The whole page."""
    e = evaluation
    title = f"mosectl eval: {named(e.subject.name)}"
    return page.draw(Page(title, (lead(e),), e.notes, parts(e), foot=(DASH, foot(e.settings))))


def lead(e: Evaluation) -> str:
    """How many facts hold, and what was compared with what."""
    said = [f"{sum(f.holds for f in e.facts)} of {counted(len(e.facts), 'fact')} hold (protocol generation)."]
    if e.subject.base:
        said.append(f"Before: {named(e.subject.base)}.")
    if e.subject.patches:
        said.append(f"{'Patch' if len(e.subject.patches) == 1 else 'Patches'}: {ids(e.subject.patches)}.")
    return " ".join(said)


def named(place: str) -> str:
    """A model or a file without the way to it on this machine, which is nobody's business to whom the page is sent."""
    return re.split(r"[\\/]", place)[-1] or place if _ROOTED.match(place) else place


def ids(found: tuple[str, ...]) -> str:
    """Ids of patches as people read them."""
    return ", ".join(p[:12] for p in found)


def parts(e: Evaluation) -> tuple[Section, ...]:
    """Every section that there is something for."""
    dots, bins = shares(e.metrics), scores.retained(e)
    along = "Facts in the order of the file; the share that holds under generation."
    title = scores.next_title(e.settings)
    return page.sections(
        Section("Facts", _facts(e)),
        Section("Metrics", _metrics(e)),
        Section("Shares", (Picture(svg_shares(dots), shares_about(dots)),) if dots else ()),
        Section("What else changed" if e.subject.base else "Probes without the expected answer", _probes(e)),
        Section("Retention", (*((Picture(svg_retention(bins), along),) if bins else ()), *cohorts_table(e.cohorts))),
        Section("Text", _texts(e)),
        Section("Next token", table(firm(scores.NEXT), scores.of_next(e.next_tokens), about=f"{title}.")),
        Section("Abilities", _abilities(e)),
        Section("Definitions", _definitions(e.settings)),
    )


def foot(settings: Mapping[str, Any]) -> str:
    """Settings that no section has told of."""
    rest = {k: v for k, v in settings.items() if k not in ("protocols", "resamples", "seed") and v not in (None, [])}
    return ", ".join(f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in rest.items())


def verdict(holds: bool) -> Mark:
    """Of a fact."""
    return Mark("holds" if holds else "does not hold", holds)


def chance(p: float | None) -> str:
    """A probability, or a dash."""
    return "–" if p is None else f"{p:.3f}"


def _facts(e: Evaluation) -> tuple[Table, ...]:
    head = FACTS if _right_after(e) else tuple(c for c in FACTS if c != "right after")
    return table(head, [_fact(f, "right after" in head) for f in e.facts], cards=True)


def _right_after(e: Evaluation) -> bool:
    """Does "right after" say anything? Of facts edited at once it is the patch's record, of the same time."""
    known = [f for f in e.facts if f.right_after is not None]
    return bool(known) and (e.subject.in_order or any(f.right_after != f.after for f in known))


def _fact(f: EvaluatedFact, batches: bool) -> tuple[Cell, ...]:
    then = (answer_cell(f.right_after),) if batches else ()
    p = chance(f.probability_before), chance(f.probability_after)
    return f.prompt, f.target_new, answer_cell(f.before), *then, answer_cell(f.after), *p, verdict(f.holds)


def _metrics(e: Evaluation) -> tuple[Table, ...]:
    told = _right_after(e)
    rows = [
        (m.protocol, m.label, *(value_text(x, ".1%") for x in (m.before, m.right_after if told else None, m.after)),
         interval_text(m.after, ".1%"), f"{m.asked:,}")
        for m in e.metrics
        if m.before or m.right_after or m.after
    ]  # fmt: skip
    return table(firm(METRICS, 2), rows)


def _texts(e: Evaluation) -> tuple[Table, ...]:
    rows = [
        (t.name, *(value_text(x, ".3f") for x in (t.before, t.after)), interval_text(t.after, ".3f"), t.about)
        for t in e.texts
        if t.before or t.after
    ]
    return table(("metric", ">before", ">after", ">95 % interval", "of what"), rows, cards=True)


def _abilities(e: Evaluation) -> tuple[Table, ...]:
    about = "By lm-evaluation-harness; ±: its standard error; interval: of the change, over the same examples."
    return table(scores.ABILITIES, scores.of_abilities(e.abilities), about=about)


def cohorts_table(found: Sequence[Cohort]) -> tuple[Table, ...]:
    """What is left of the oldest, middle and newest facts."""
    head, about = firm(scores.COHORTS, 2), f"{scores.COHORTS_HELP[:1].upper()}{scores.COHORTS_HELP[1:]}."
    return table(head, scores.of_cohorts(found), title=scores.COHORTS_TITLE, about=about)


def _probes(e: Evaluation) -> tuple[Table | Words, ...]:
    """The probes that changed and should not have, or the other way round; folded where they are many."""
    if not e.probes:
        return ()
    found = surprising(e.probes)
    if not found:
        return (Words(f"Nothing, at {counted(len(e.probes), 'probe')}."),)
    rows = [(str(p.fact), *row, p.expected or "–") for p, row in zip(found, scores.of_probes(found), strict=True)]
    head = (">fact", "~prompt", "group", "before", "after", "!what happened", "expected")
    told = f"{len(found):,} of {counted(len(e.probes), 'probe')}, the most surprising first"
    return table(head, rows, cards=True, folded=told)


def _definitions(settings: Mapping[str, Any]) -> tuple[Terms | Words, ...]:
    from mosectl.measure.protocols import PROTOCOLS

    source = {name: f" ({p.source})" for name, p in PROTOCOLS.items()}
    items = tuple((name, f"{about}{source.get(name, '')}") for name, about in settings["protocols"].items())
    how = (
        f"Intervals: percentile bootstrap over facts, {settings['resamples']} resamples, seed {settings['seed']}; of shares "
        "of 0 and 100 %, which resampling cannot move, Wilson's, each fact a trial. "
        "Right after: what the patches recorded when a fact's own batch was done."
    )
    return Terms(items), Words(how)
