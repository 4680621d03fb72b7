"""Rows of tables about scores: an edit's, a patch's, and what comes next before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mosectl.editing.methods import DEFAULT
from mosectl.editing.settings import of_today
from mosectl.facts.groups import FORGETFULNESS, NEIGHBOURS, SAME_SUBJECT, shown
from mosectl.text.shown import answer_cell, before_and_after

if TYPE_CHECKING:
    from mosectl.editing.outcome import FactResult
    from mosectl.measure.answers import Scores
    from mosectl.measure.evaluate import Evaluation
    from mosectl.measure.groups import Share
    from mosectl.measure.lm_harness import Ability, Score
    from mosectl.measure.next_tokens import NextToken
    from mosectl.measure.probes import ProbeAnswer
    from mosectl.measure.retention import Bin, Cohort
    from mosectl.patch.record import PatchFact

KEPT = 0.5  # of a group of probes, below which it is said
COLUMNS = ("", ">share", ">as QA compares", ">prompts", "meaning")
AS_QA = (
    "as QA compares: differences in case, articles, punctuation and a leading 'the city of' are ignored; a locality prompt "
    "counts as kept if the model gives the known answer again or, where none is known or it gave another one before, if the "
    "first three words of its answer are the same"
)
MEANINGS = {
    "reliability": "edit prompts answered with the new object",
    "generalization": "rephrased prompts answered with the new object",
    "locality": "prompts that the edit should leave alone, answered as before",
}
_OF_GROUPS = {
    NEIGHBOURS: "the relation of other subjects",
    SAME_SUBJECT: "other relations of the subjects",
    FORGETFULNESS: "other objects of the relation",
    "known wordings": "those of them that the model answered with the old object before",
}
NEXT = ("where", ">prompts", ">KL, nats", ">95 % interval", ">top-1 kept", ">95 % interval")
NEXT_RECORDED = ("where", ">prompts", ">KL, nats", ">top-1 kept")
COHORTS = ("facts", "share", ">right after", ">after", ">95 % interval", ">prompts")
COHORTS_TITLE = "The oldest, middle and newest facts, in the order of the edit"
COHORTS_HELP = (
    "right after: when a fact's own batch was done, asked as now (generation); kept: of the facts that held then, the share "
    "that holds now; how the prompts around a fact were answered then is not known"
)
STABILITY = ("tensor", ">‖W‖", ">κ(W)", ">‖W‖ drift", ">κ drift", ">largest σ drift")
ABILITIES = ("task", "metric", ">before", ">after", ">change", ">95 % interval", ">examples")
CHANGED = ("prompt", "group", "before", "after", "")


def next_title(settings: Mapping[str, Any]) -> str:
    """Of the table of next tokens; in 16 bits an answer may have stayed whose first token loses a near tie here."""
    kind = settings.get("dtype")
    near = f"; in {kind} near ties go either way" if kind in ("bfloat16", "float16") else ""
    return f"Next token: KL (before ‖ after), and the likeliest token kept{near}"


def percent(share: float | None) -> str:
    """A share, or a dash."""
    return "–" if share is None else f"{share:.1%}"


def label(group: str, own: bool, otherwise: str) -> str:
    """A group's name in a table."""
    return (shown(group) or otherwise) + (" (own probes)" if own else "")


def token_of(method: str, record: Mapping[str, Any]) -> str:
    """The fact token of an edit, by its record of options; empty where its method or its search has no other one."""
    if method != DEFAULT or of_today("fisher", record["targets"]["fisher"])[1] == "published":
        return ""
    return str(of_today("fact_token", record["fact_token"])[1])


def disturbed(shares: Sequence[Share], fact_token: str, gentler: str) -> str:
    """What an edit has changed besides, where it is half of a group or more, and what may spare it; empty: nothing.

    Args:
        fact_token: as :func:`token_of` has it. gentler: how its method does less harm.
    """
    spared = {SAME_SUBJECT: "last", NEIGHBOURS: "subject_last"}  # where it is edited (docs/explanation/methods.md)
    lost = [s for s in shares if s.metric == "locality" and s.group and s.qa is not None and s.qa < KEPT]
    if not lost:
        return ""
    worst = min(lost, key=lambda s: s.qa or 0.0)
    told = ", ".join(f"{label(s.group, s.own, '')} {percent(s.qa)} kept" for s in lost)
    other = spared.get(worst.group, fact_token)
    place = f", or --set fact_token={other}" if fact_token and other != fact_token else ""
    return f"much else changed ({told}): {gentler}{place} may spare more"


def of_edit(scores: Scores, shares: Sequence[Share]) -> Iterator[tuple[str, ...]]:
    """The scores of an edit, each above its parts."""
    whole = {
        "reliability": (scores.reliability, scores.facts),
        "generalization": (scores.generalization, scores.rephrasings),
        "locality": (scores.locality, scores.locality_prompts),
    }
    for name, (share, of) in whole.items():
        lenient = next((s.qa for s in shares if (s.metric, s.group) == (name, "")), None)
        yield name, percent(share), percent(lenient), str(of), MEANINGS[name]
        if name == "generalization" and scores.rephrasings_unseen < scores.rephrasings:
            yield _unseen(scores.unseen, scores.rephrasings_unseen, " (see below)")
        for s in shares:
            if s.metric == name and s.group:
                yield _part(s.group, s.own, s.strict, s.qa, s.asked)


def _unseen(share: float | None, asked: int, more: str = "") -> tuple[str, ...]:
    return "  unseen wordings", percent(share), "–", str(asked), f"those of them that were not edited along{more}"


def of_patch(shares: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The shares that a patch has recorded, and of its scores what stands in none of them."""
    unseen, asked = scores.get("unseen"), scores.get("rephrasings_unseen")
    for s in shares:
        if s["group"]:
            yield _part(s["group"], s["own"], s["strict"], s["qa"], s["asked"])
        else:
            about = MEANINGS.get(s["metric"], "")
            yield s["metric"], percent(s["strict"]), percent(s["qa"]), str(s["asked"]), about
            if (
                s["metric"] == "generalization"
                and isinstance(unseen, float)
                and isinstance(asked, int)
                and asked < s["asked"]
            ):
                yield _unseen(unseen, asked)


def _part(group: str, own: bool, strict: float | None, lenient: float | None, asked: int) -> tuple[str, ...]:
    meaning = _OF_GROUPS.get(group, "so called in the facts file")
    if own:
        meaning += ": prompts of mosectl's own, as the file has none"
    return f"  {label(group, own, '')}", percent(strict), percent(lenient), str(asked), meaning


def of_fact(prompt: str, asked: FactResult | PatchFact, status: str) -> tuple[str, ...]:
    """A fact's answers before and after, and how likely the new object was."""
    said = before_and_after(asked.before, asked.after, asked.probability_before, asked.probability_after)
    return prompt, *said, status


def of_probes(probes: Sequence[ProbeAnswer]) -> list[tuple[str, ...]]:
    """Probes with their answers before and after."""
    return [(p.prompt, of_probe(p), answer_cell(p.before), answer_cell(p.after), p.change) for p in probes]


def of_probe(probe: ProbeAnswer) -> str:
    """The group that a probe stands in, as tables name it."""
    if probe.metric == "generalization":
        return "rephrasing"
    return label(probe.group, probe.own, probe.metric)


def of_next(tokens: Sequence[NextToken]) -> list[tuple[str, ...]]:
    """What comes next, with intervals."""
    from mosectl.measure.bootstrap import interval_text  # here: numpy is slow to import

    return [
        (
            _where(t.of, t.group, t.own), str(t.prompts), f"{t.kl.value:.4f}", interval_text(t.kl, ".4f"),
            f"{t.top1.value:.1%}", interval_text(t.top1, ".1%"),
        )
        for t in tokens
    ]  # fmt: skip


def retained(evaluation: Evaluation) -> tuple[Bin, ...]:
    """What is left of the facts in their order; none where all were edited at once, and no order was."""
    bins = evaluation.retention
    return bins if evaluation.subject.in_order and len(bins) > 1 else ()


def of_cohorts(cohorts: Sequence[Cohort]) -> list[tuple[str, ...]]:
    """What is left of a run's facts by their age."""
    from mosectl.measure.bootstrap import interval_text, value_text  # here: numpy is slow to import

    rows: list[tuple[str, ...]] = []
    for c in cohorts:
        shares = [("reliability", value_text(c.right_after, ".1%"), c.after, c.after.units)]
        if c.kept:
            shares.append(("  kept", "–", c.kept, c.kept.units))
        shares += [(f"{label(p.group, p.own, p.metric)} (QA)", "–", p.after, p.asked) for p in c.parts]
        for name, then, now, asked in shares:
            rows.append((c.label, name, then, f"{now.value:.1%}", interval_text(now, ".1%"), str(asked)))
    return rows


def of_next_recorded(tokens: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What comes next, as a patch has recorded it."""
    return [
        (_where(t["of"], t["group"], t["own"]), str(t["prompts"]), f"{t['kl']:.4f}", percent(t["top1"])) for t in tokens
    ]


def _where(of: str, group: str, own: bool) -> str:
    return "ordinary text" if of == "text" else label(group, own, "locality prompts")


def of_abilities(abilities: Sequence[Ability]) -> list[tuple[str, ...]]:
    """A row under :data:`ABILITIES` for each: the arrow says where better is, the interval is that of the change."""
    from mosectl.measure.bootstrap import interval_text, value_text  # here: numpy is slow to import

    arrow = {True: " ↑", False: " ↓", None: ""}

    def score(s: Score | None) -> str:
        return "–" if s is None else f"{s.value:.3f}" + ("" if s.stderr is None else f" ± {s.stderr:.3f}")

    return [
        (a.task, a.metric + arrow[a.higher_is_better], score(a.before), score(a.after),
         value_text(a.change, "+.3f"), interval_text(a.change, "+.3f"), str(a.examples))
        for a in abilities
    ]  # fmt: skip
