"""Metrics over a part of the prompts: named groups of probes, and wordings of a fact that the model knew before.

A part is judged by a protocol as a fact that has these prompts alone, so its definitions are the protocol's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mosectl.facts.groups import NEIGHBOURS, SAME_SUBJECT, shown
from mosectl.facts.records import Fact, Probe
from mosectl.measure.answers import Interview
from mosectl.measure.bootstrap import Tally
from mosectl.measure.next_tokens import NextToken, Place, compare_next
from mosectl.measure.own_probes import counts, objects_by_subject
from mosectl.measure.protocols import PROTOCOLS, Answers, portable_probes
from mosectl.measure.qa import old_object, says

KNOWN = "known wordings"  # rephrasings that the unedited model answered with the old object

GREEDY = ("generation", "qa")  # protocols that judge what the model says


@dataclass(frozen=True)
class Part:
    """Some of a metric's prompts."""

    metric: str
    group: str  # a group of probes, or KNOWN; "": all prompts
    own: bool = False  # probes of mosectl's own

    def label(self) -> str:
        """As tables name it."""
        return (shown(self.group) or self.metric) + (" (own probes)" if self.own else "")


@dataclass(frozen=True)
class Share:
    """A metric over all of its prompts, or over a part of them, under `generation`; None where there was nothing to ask."""

    metric: str
    group: str  # "": all prompts
    own: bool
    asked: int  # prompts
    qa: float | None  # answers compared as QA does; of locality: kept
    strict: float | None  # by every letter; of locality: the whole answer


def parts(facts: Sequence[Fact], before: Sequence[Answers] | None, neighbours: Collection[int] = ()) -> list[Part]:
    """All parts that these facts may have, in the order of tables.

    Args:
        neighbours: numbers of facts that were not edited and share their wording with one that was.
    """
    locality, portability = (_named(facts, field) for field in ("locality", "portability"))
    out = [Part("generalization", KNOWN)] if before else []
    out += [Part("locality", g) for g in locality]
    if before and NEIGHBOURS not in locality and neighbours:
        out.append(Part("locality", NEIGHBOURS, own=True))
    if before and any(a.probes for a in before):
        out.append(Part("locality", SAME_SUBJECT, own=True))
    return out + [Part("portability", g) for g in portability]


def _named(facts: Sequence[Fact], field: str) -> list[str]:
    """The groups that the facts' probes stand in, in the order of the file."""
    return list(dict.fromkeys(p.group for f in facts for p in getattr(f, field) if p.group))


def wording(fact: Fact) -> str:
    """A fact's prompt without its subject: facts of one relation often share it. A prompt that is all subject stays."""
    if fact.subject == fact.prompt:
        return fact.prompt
    return " ".join(fact.prompt.replace(fact.subject, "{}").split())


def unedited_neighbours(facts: Sequence[Fact], edited: Collection[int]) -> frozenset[int]:
    """Facts that were not edited, of the relation of one that was: their answers shall stay."""
    worded = {wording(facts[i]) for i in edited}
    return frozenset(i for i, f in enumerate(facts) if i not in edited and wording(f) in worded)


def tallies(
    protocol: str, part: Part, facts: Sequence[Fact], now: Sequence[Answers], before: Sequence[Answers] | None,
    neighbours: Collection[int] = (),
) -> tuple[list[Tally], int]:  # fmt: skip
    """One part under a protocol: a tally of each fact, and the number of prompts behind them."""
    out, prompts = [], 0
    own = own_counted(facts, before if part.own else None)
    for i, fact in enumerate(facts):
        asked = fact, now[i], before[i] if before else None
        if part.own and part.group == NEIGHBOURS:
            asked = _as_neighbour(*asked, i in neighbours)
        elif part.group:
            asked = _narrowed(part, *asked, own[i])
        tally = PROTOCOLS[protocol].judge(*asked)[part.metric]
        out.append(tally)
        prompts += prompts_of(protocol, part.metric, asked[0], tally)
    return out, prompts


def prompts_of(protocol: str, metric: str, fact: Fact, tally: Tally) -> int:
    """Prompts of a fact behind a tally: those without a known answer do not count where one is needed."""
    if protocol in GREEDY:
        return int(tally.weight)
    known = {"locality": fact.locality, "portability": fact.portability}
    count = 1 if metric == "reliability" else len(fact.rephrase_prompts)
    if metric in known:
        count = sum(bool(p.answer) for p in known[metric])
    return count if tally.weight else 0


Asked = tuple[Fact, Answers, Answers | None]


def _narrowed(part: Part, fact: Fact, now: Answers, before: Answers | None, own: Sequence[int]) -> Asked:
    """The fact and what was answered, with the part's prompts alone."""
    if part.metric == "generalization":
        known = before.rephrased if before else ()
        which = [i for i, text in enumerate(known) if before and known_wording(fact, before.said, text)]
        return _picked(fact, now, before, "rephrase_prompts", fact.rephrase_prompts, "rephrased", which)
    if part.own:
        new, old = (a and replace(a, local=a.own) for a in (now, before))
        assert new
        return _picked(fact, new, old, "locality", now.probes, "local", own)
    field, said = ("locality", "local") if part.metric == "locality" else ("portability", "portable")
    probes = getattr(fact, field)
    if field == "portability":
        probes = tuple(portable_probes(fact))
    which = [i for i, p in enumerate(probes) if p.group == part.group]
    return _picked(fact, now, before, field, probes, said, which)


def _picked(
    fact: Fact, now: Answers, before: Answers | None, field: str, prompts: Sequence[Any], said: str, which: Sequence[int]
) -> Asked:  # fmt: skip
    def of(a: Answers) -> Answers:
        texts: Any = {said: tuple(getattr(a, said)[i] for i in which)}
        return replace(a, **texts)

    picked: Any = {field: tuple(prompts[i] for i in which)}
    return replace(fact, **picked), of(now), of(before) if before else None


def _as_neighbour(fact: Fact, now: Answers, before: Answers | None, is_one: bool) -> Asked:
    """An unedited fact's prompt as a locality prompt of its own."""
    probes = (Probe(fact.prompt, fact.ground_truth, NEIGHBOURS),) if is_one else ()
    new, old = (a and replace(a, local=(a.said,) * len(probes)) for a in (now, before))
    assert new
    return replace(fact, locality=probes), new, old


def known_wording(fact: Fact, said: str, text: str) -> bool:
    """Did the model answer a rephrasing with the old object? False where that cannot be told (:func:`qa.old_object`)."""
    old = old_object(fact, said)
    return bool(old) and says(text, old)


def own_counted(facts: Sequence[Fact], before: Sequence[Answers] | None) -> list[list[int]]:
    """For each fact the numbers of the probes of our own that watch something else than the facts about its subject.

    The answers before decide it alone, without them none counts: an edit does not choose its own witnesses.
    """
    if not before:
        return [[]] * len(facts)
    objects = objects_by_subject(facts, [a.said for a in before])
    return [[i for i, text in enumerate(a.own) if counts(o, text)] for o, a in zip(objects, before, strict=True)]


# An edit's two interviews.


def answers_of(i: Interview) -> list[Answers]:
    """What an interview heard, fact by fact."""
    none: tuple[Any, ...] = ((),) * len(i.answers)
    asked = zip(i.answers, i.rephrased, i.local, i.own or none, i.probes or none, strict=True)
    return [Answers(said.text, again, local, (), {}, own, probes) for said, again, local, own, probes in asked]


def as_interviewed(facts: Sequence[Fact]) -> list[Fact]:
    """The facts without what an interview does not ask."""
    return [replace(f, portability=()) for f in facts]


def shares(facts: Sequence[Fact], before: Interview, after: Interview) -> tuple[Share, ...]:
    """Every metric over all prompts and over each part, both ways to compare; a part without a prompt is left out."""
    old, new, facts = answers_of(before), answers_of(after), as_interviewed(facts)
    whole = [Part(name, "") for name in ("reliability", "generalization", "locality")]
    found = parts(facts, old)
    return tuple(_shares([p for w in whole for p in (w, *(x for x in found if x.metric == w.metric))], facts, old, new))


def _shares(
    wanted: Sequence[Part], facts: Sequence[Fact], old: Sequence[Answers], new: Sequence[Answers]
) -> Iterator[Share]:
    for part in wanted:
        (lenient, asked), (strict, _) = (tallies(p, part, facts, new, old) for p in ("qa", "generation"))
        if asked or not part.group:
            yield Share(part.metric, part.group, part.own, asked, _share(lenient), _share(strict))


def _share(found: Sequence[Tally]) -> float | None:
    weight = sum(t.weight for t in found)
    return sum(t.total for t in found) / weight if weight else None


def moved(facts: Sequence[Fact], before: Interview, after: Interview) -> tuple[NextToken, ...]:
    """How far the next token moved, by group and in ordinary text; probes of our own count as they do for shares."""
    assert before.next and after.next
    return compare_next(before.next, after.next, counted_by(facts, answers_of(before)))


def counted_by(facts: Sequence[Fact], before: Sequence[Answers]) -> Any:
    """Whether a place's prompt counts: those of the file and of text do."""
    own = own_counted(facts, before)

    def counted(place: Place) -> bool:
        return not place.own or place.at in own[place.unit]

    return counted


def recorded(shares: Sequence[Share], tokens: Sequence[NextToken]) -> dict[str, list[dict[str, Any]]]:
    """For a patch's record: values without their intervals."""
    plain = [asdict(t) | {"kl": t.kl.value, "top1": t.top1.value} for t in tokens]
    return {"shares": [asdict(s) for s in shares], "next_tokens": plain}
