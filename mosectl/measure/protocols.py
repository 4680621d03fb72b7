"""The named protocols: what counts as reliable, general, local and portable, and where each definition comes from.

| protocol   | reliability, generalization          | locality                          | portability     | mean over      |
|------------|--------------------------------------|-----------------------------------|-----------------|----------------|
| generation | greedy answer starts with the object | greedy answer is that from before | as reliability  | prompts        |
| qa         | as generation, compared as QA does   | known answer or first three words | as reliability  | prompts        |
| easyedit   | share of target tokens = argmax      | share of argmax tokens unchanged  | as reliability  | prompts, facts |
| memit      | NLL(new) < NLL(true)                 | NLL(known answer) < NLL(new)      | not defined     | prompts, facts |
| zsre       | share of target tokens = argmax      | share of known answer's tokens    | as reliability  | tokens, facts  |

Where an object or an answer has aliases, `generation` and `qa` take any of them; the others score the first name alone.
"Mean over prompts, facts": first within each fact, then over facts. All but `generation` and `qa` are teacher-forced: the
model is shown the answer's earlier tokens, which flatters it (arXiv 2502.11177). Without a model from before the edit,
locality under `generation`, `qa` and `easyedit` is measured against the known answer instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mosectl.facts.records import Fact, Probe
from mosectl.measure import qa as lenient
from mosectl.measure.answers import judge_fact
from mosectl.measure.bootstrap import Tally
from mosectl.model.generation import says
from mosectl.model.scoring import Pair, Scored, paired

METRICS = ("reliability", "generalization", "locality", "portability")


@dataclass(frozen=True)
class Answers:
    """All that one model said about one fact: greedy continuations, and teacher-forced scores by pair."""

    said: str
    rephrased: tuple[str, ...]
    local: tuple[str, ...]
    portable: tuple[str, ...]  # of :func:`portable_probes`
    scores: Mapping[Pair, Scored]
    own: tuple[str, ...] = ()  # of the locality prompts of mosectl's own
    probes: tuple[Probe, ...] = ()  # which are these


Tallies = dict[str, Tally]  # by metric


@dataclass(frozen=True)
class Protocol:
    """One way to judge an edit."""

    name: str
    about: str
    source: str
    needs: Callable[[Fact], list[Pair]]  # what must be scored
    judge: Callable[[Fact, Answers, Answers | None], Tallies]  # fact, the model asked, the model before the edit


def portable_probes(fact: Fact) -> list[Probe]:
    """The portability prompts whose answer is known: the others cannot be judged."""
    return [p for p in fact.portability if p.answer]


def asks(protocol: str, fact: Fact) -> set[str]:
    """The metrics a fact has something to ask for, given a model from before the edit: those that weigh anything at all."""
    chosen, empty = PROTOCOLS[protocol], Scored((0,), (0,), (0.0,))
    texts = [("",) * len(probes) for probes in (fact.rephrase_prompts, fact.locality, portable_probes(fact))]
    silent = Answers("", texts[0], texts[1], texts[2], dict.fromkeys(chosen.needs(fact), empty))
    return {metric for metric, tally in chosen.judge(fact, silent, silent).items() if tally.weight}


def _known(fact: Fact, probes: Sequence[Probe]) -> list[Pair]:
    return [paired(fact, p.prompt, p.answer) for p in probes if p.answer]


def _prompts(fact: Fact, answer: str) -> tuple[list[Pair], list[Pair]]:
    """The edit prompt, and the rephrasings, each with ``answer``."""
    return [paired(fact, fact.prompt, answer)], [paired(fact, p, answer) for p in fact.rephrase_prompts]


def generation(fact: Fact, now: Answers, before: Answers | None) -> Tallies:
    """Greedy decoding from the bare prompt, judged by :func:`mosectl.model.generation.says`; every prompt counts alike.

    "The Mirage of Model Editing", arXiv 2502.11177: real decoding, no teacher forcing, natural end of the answer.
    """
    hops = zip(now.portable, portable_probes(fact), strict=True)
    return {
        **judge_fact(fact, now.said, now.rephrased, now.local, before.local if before else None),
        "portability": Tally.of([says(said, *p.answers) for said, p in hops]),
    }


def qa(fact: Fact, now: Answers, before: Answers | None) -> Tallies:
    """The answers of `generation`, judged by :mod:`mosectl.measure.qa`: case, articles, punctuation, "the city of" aside.

    Locality is *kept*: the known answer where the model gave it before, else the first three words of its answer.
    """
    hops = zip(now.portable, portable_probes(fact), strict=True)
    return {
        **lenient.judge_fact(fact, now.said, now.rephrased, now.local, before.local if before else None),
        "portability": Tally.of([lenient.says(said, *p.answers) for said, p in hops]),
    }


def easyedit(fact: Fact, now: Answers, before: Answers | None) -> Tallies:
    """One forward over prompt + target; the share of target tokens that are the argmax, per prompt, then per fact.

    EasyEdit (arXiv 2308.07269), `test_prediction_acc` in easyeditor/evaluate/evaluate_utils.py. Locality there compares
    the argmax tokens at the known answer's positions before and after the edit, right or wrong.
    """
    old = before.scores if before else None
    kept = []
    for pair in _known(fact, fact.locality):
        new = now.scores[pair]
        expected = old[pair].predicted if old else new.target
        kept.append(sum(a == b for a, b in zip(expected, new.predicted, strict=True)) / len(expected))
    edit, rephrased = _prompts(fact, fact.target_new)
    return {
        "reliability": _mean([now.scores[p].accuracy for p in edit]),
        "generalization": _mean([now.scores[p].accuracy for p in rephrased]),
        "locality": _mean(kept),
        "portability": _mean([now.scores[p].accuracy for p in _known(fact, fact.portability)]),
    }


def memit(fact: Fact, now: Answers, before: Answers | None) -> Tallies:
    """Is the new object likelier than the true one (mean NLL a token)? Of neighbours the reverse: their known answer wins.

    Efficacy, paraphrase and neighbourhood success of CounterFact: ROME (arXiv 2202.05262) and MEMIT (arXiv 2210.07229),
    `test_batch_prediction` and experiments/summarize.py. Needs ``ground_truth`` (for locality: the prompt's own known
    answer). A portability prompt has no second object to compare with, so there is no such number.
    """

    def likelier(prompt: str, a: str, b: str) -> float:
        return float(now.scores[paired(fact, prompt, a)].nll < now.scores[paired(fact, prompt, b)].nll)

    new, true = fact.target_new, fact.ground_truth
    asked = [fact.prompt, *fact.rephrase_prompts] if true else []
    wins = [likelier(p, new, true or "") for p in asked]
    return {
        "reliability": _mean(wins[:1]),
        "generalization": _mean(wins[1:]),
        "locality": _mean([likelier(p.prompt, p.answer, new) for p in fact.locality if p.answer and p.answer != new]),
        "portability": _mean([]),
    }


def zsre(fact: Fact, now: Answers, before: Answers | None) -> Tallies:
    """Teacher-forced accuracy over all target tokens of a fact, then over facts; locality against the known answer.

    zsRE as in MEND (arXiv 2110.11309) and MEMIT (arXiv 2210.07229), experiments/py/eval_utils_zsre.py. Reliability is
    `easyedit`'s; locality asks for the right answer where `easyedit` asks for an unchanged one.
    """

    def tokens(pairs: list[Pair]) -> Tally:
        hits, of = (sum(f(now.scores[p]) for p in pairs) for f in (lambda s: s.hits, lambda s: len(s.target)))
        return Tally(hits / of, 1.0) if of else Tally(0.0, 0.0)

    edit, rephrased = _prompts(fact, fact.target_new)
    return {
        "reliability": tokens(edit),
        "generalization": tokens(rephrased),
        "locality": tokens(_known(fact, fact.locality)),
        "portability": tokens(_known(fact, fact.portability)),
    }


def _mean(values: Sequence[float]) -> Tally:
    """Every fact counts alike, however many prompts it has."""
    return Tally(sum(values) / len(values), 1.0) if values else Tally(0.0, 0.0)


def _forced(fact: Fact) -> list[Pair]:
    edit, rephrased = _prompts(fact, fact.target_new)
    return [*edit, *rephrased, *_known(fact, fact.locality), *_known(fact, fact.portability)]


def _rivals(fact: Fact) -> list[Pair]:
    local = [paired(fact, p.prompt, a) for p in fact.locality if p.answer for a in (p.answer, fact.target_new)]
    if not fact.ground_truth:
        return local
    prompts = (fact.prompt, *fact.rephrase_prompts)
    return [*(paired(fact, p, answer) for p in prompts for answer in (fact.target_new, fact.ground_truth)), *local]


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "generation",
            "the one that counts: greedy decoding from the bare prompt, nothing of the answer is shown; it starts with the "
            "object; locality: answered as before",
            "arXiv 2502.11177",
            lambda fact: [],
            generation,
        ),
        Protocol(
            "qa",
            "the answers of generation, compared as QA does: differences in case, articles, punctuation and a leading 'the "
            "city of' are ignored; locality: the model gives the known answer again or, where none is known or it gave "
            "another one before, an answer with the same first three words",
            "arXiv 1606.05250",
            lambda fact: [],
            qa,
        ),
        Protocol(
            "easyedit",
            "teacher-forced, so higher than what users see: share of target tokens that are the argmax, each after the "
            "right ones before it; locality: argmax tokens unchanged",
            "arXiv 2308.07269",
            _forced,
            easyedit,
        ),
        Protocol(
            "memit",
            "no answer is generated: the new object is likelier than the true one (NLL a token); locality: the known answer "
            "than the new",
            "arXiv 2202.05262, 2210.07229",
            _rivals,
            memit,
        ),
        Protocol(
            "zsre",
            "teacher-forced as easyedit, over all target tokens of a fact; locality: over the known answer's tokens",
            "arXiv 2110.11309, 2210.07229",
            _forced,
            zsre,
        ),
    )
}
