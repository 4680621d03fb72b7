"""Every probe by itself: what the model answered before and after an edit, and whether that is what an edit should do.

Probes are rephrasings, locality prompts (mosectl's own among them) and portability prompts. The shares in the tables are
means over these; here one sees which of them broke.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from mosectl.facts.groups import NEIGHBOURS
from mosectl.facts.records import Fact, Probe
from mosectl.measure import qa
from mosectl.measure.answers import Interview, same_answer
from mosectl.measure.groups import KNOWN, Part, answers_of, as_interviewed, known_wording, own_counted, parts
from mosectl.measure.protocols import Answers, portable_probes
from mosectl.model.generation import answer, ended, says
from mosectl.text.table import csv_bytes

# What happened, the most surprising first.
NEW_OBJECT = "says the new object"  # of a locality prompt, whose answer should stay
CHANGED = "changed"
NOT_KNOWN = "not the known answer"  # without a model from before the edit
FIRST_WORDS = "first words kept"  # of an answer that nobody knows: kept under `qa`, not under `generation`
NOT_YET = "not yet"  # of a rephrasing or a portability prompt: not the answer that the edit calls for
OTHER_FORM = "expected answer, other form"  # right under `qa`, not under `generation`
NOT_EDITED = "its fact was not edited"
_STAYS = (NEW_OBJECT, CHANGED, NOT_KNOWN, FIRST_WORDS)
_FOLLOWS = (NOT_YET, OTHER_FORM)


@dataclass(frozen=True)
class ProbeAnswer:
    """One probe, asked before and after an edit.

    Rephrasings and portability prompts are asked only until their answer can be judged: one that may go on ends with "…".
    """

    fact: int  # its number in the list of facts, from 1
    prompt: str
    metric: str  # generalization, locality or portability
    group: str  # of the file; groups.KNOWN: a rephrasing that was answered with the old object before; "": none
    own: bool  # a probe of mosectl's own
    expected: str | None  # the new object, or the known answer
    before: str | None  # None: there is no model from before the edit
    after: str
    generation: bool | None  # kept (locality) or followed (the others) by this protocol; None: cannot be judged
    qa: bool | None
    change: str  # in words what happened; empty: what should


def probes_of(facts: Sequence[Fact], before: Interview, after: Interview) -> tuple[ProbeAnswer, ...]:
    """The probes of an edit's two interviews."""
    return probe_answers(as_interviewed(facts), answers_of(before), answers_of(after))


def probe_answers(
    facts: Sequence[Fact], before: Sequence[Answers] | None, now: Sequence[Answers],
    neighbours: Collection[int] = (), unedited: Collection[int] = (),
) -> tuple[ProbeAnswer, ...]:  # fmt: skip
    """Every probe that counts in a share, fact by fact.

    Args:
        neighbours: numbers (from 0) of facts that were not edited and share their wording with one that was.
        unedited: numbers of all facts that were not edited: nothing follows from them.
    """
    also = Part("locality", NEIGHBOURS, own=True) in parts(facts, before, neighbours)
    own = own_counted(facts, before)
    out: list[ProbeAnswer] = []
    for i, fact in enumerate(facts):
        of = _OfFact(i + 1, fact, now[i], before[i] if before else None, i not in unedited, own[i])
        out += [*of.rephrased(), *of.local(), *of.own(), *(of.as_neighbour() if also and i in neighbours else ())]
        out += of.portable()
    return tuple(out)


def surprising(probes: Iterable[ProbeAnswer]) -> list[ProbeAnswer]:
    """Those that an edit should not have left so, the most surprising first: what should have stayed before what should
    have followed.
    """
    order = {("locality", change): i for i, change in enumerate((*_STAYS, OTHER_FORM))}
    order |= {
        (m, change): len(order) + i for m in ("generalization", "portability") for i, change in enumerate(_FOLLOWS)
    }
    return sorted((p for p in probes if (p.metric, p.change) in order), key=lambda p: order[p.metric, p.change])


def probes_csv(probes: Sequence[ProbeAnswer]) -> bytes:
    """One row a probe; empty: there is none, or it cannot be judged."""
    names = [f.name for f in fields(ProbeAnswer)]
    return csv_bytes(names, ([getattr(p, n) for n in names] for p in probes))


@dataclass(frozen=True)
class _OfFact:
    """One fact's probes."""

    number: int
    fact: Fact
    now: Answers
    before: Answers | None
    edited: bool
    watched: Sequence[int]  # numbers of the probes of mosectl's own that count

    def rephrased(self) -> Iterator[ProbeAnswer]:
        old = self.before.rephrased if self.before else (None,) * len(self.now.rephrased)
        for prompt, was, text in zip(self.fact.rephrase_prompts, old, self.now.rephrased, strict=True):
            known = self.before and was is not None and known_wording(self.fact, self.before.said, was)
            probe = Probe(prompt, self.fact.target_new, KNOWN if known else "", self.fact.target_aliases)
            yield self._followed("generalization", probe, was, text)

    def portable(self) -> Iterator[ProbeAnswer]:
        probes = [p for p in self.fact.portability if p.answer]
        assert len(probes) == len(portable_probes(self.fact))
        old = self.before.portable if self.before else (None,) * len(probes)
        for probe, was, text in zip(probes, old, self.now.portable, strict=True):
            yield self._followed("portability", probe, was, text)

    def local(self) -> Iterator[ProbeAnswer]:
        old = self.before.local if self.before else (None,) * len(self.now.local)
        for probe, was, text in zip(self.fact.locality, old, self.now.local, strict=True):
            yield self._kept(probe, was, text)

    def own(self) -> Iterator[ProbeAnswer]:
        """Those of mosectl's own that watch something else than the facts about the subject."""
        if self.before:
            for i in self.watched:
                yield self._kept(self.now.probes[i], self.before.own[i], self.now.own[i], own=True)

    def as_neighbour(self) -> Iterator[ProbeAnswer]:
        """The prompt of a fact that was not edited."""
        probe = Probe(self.fact.prompt, self.fact.ground_truth, NEIGHBOURS)
        yield self._kept(probe, self.before.said if self.before else None, self.now.said, own=True)

    def _followed(self, metric: str, probe: Probe, before: str | None, after: str) -> ProbeAnswer:
        right = probe.answers
        strict, lenient = says(after, *right), qa.says(after, *right)
        change = "" if strict else NOT_EDITED if not self.edited else OTHER_FORM if lenient else NOT_YET
        old = None if before is None else _as_asked(before, probe.group == KNOWN or qa.says(before, *right))
        return ProbeAnswer(
            self.number,
            probe.prompt,
            metric,
            probe.group,
            False,
            probe.answer,
            old,
            _as_asked(after, lenient),
            strict,
            lenient,
            change,
        )

    def _kept(self, probe: Probe, before: str | None, after: str, own: bool = False) -> ProbeAnswer:
        strict: bool | None = None
        lenient: bool | None = None
        if before is not None:
            strict, lenient = same_answer(before, after, *probe.answers), qa.kept(before, after, *probe.answers)
        elif probe.answer:
            strict, lenient = says(after, *probe.answers), qa.says(after, *probe.answers)
        old, new = None if before is None else answer(before), answer(after)
        told = (self.number, probe.prompt, "locality", probe.group, own, probe.answer, old, new, strict, lenient)
        change = ""
        if strict is False and lenient:
            change = OTHER_FORM if qa.says(after, *probe.answers) else FIRST_WORDS
        elif strict is False:
            change = self._loss(old, new)
        return ProbeAnswer(*told, change)

    def _loss(self, before: str | None, after: str) -> str:
        if self.edited and any(
            qa.mentions(after, name) and not qa.mentions(before or "", name) for name in self.fact.targets
        ):
            return NEW_OBJECT
        return CHANGED if before is not None else NOT_KNOWN


def _as_asked(text: str, whole: bool) -> str:
    """The answer, and "…" where the model was not asked to its end, unless it is an object that was looked for."""
    return answer(text) + ("" if whole or ended(text) else "…")
