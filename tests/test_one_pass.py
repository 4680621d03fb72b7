"""An interview asks everything in one pass, stops early without changing a verdict, and is remembered whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mosectl.facts.records import Fact, Probe
from mosectl.measure import answers, groups, next_tokens
from mosectl.measure.answers import interview
from mosectl.measure.groups import KNOWN
from mosectl.measure.own_probes import TOKENS, own_probes
from mosectl.model.generation import answer
from mosectl.model.questions import generate
from support.evaluations import FACTS
from support.models import make_tokenizer, pico


def test_probes_of_our_own_are_asked_with_the_rest_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    facts = [replace(f, locality=(), rephrase_prompts=()) for f in FACTS[:2]]
    probes, passes, real = own_probes(facts, False), [], answers.ask
    assert [len(p) for p in probes] == [4, 4]
    monkeypatch.setattr(answers, "ask", lambda *args, **how: passes.append(len(args[2])) or real(*args, **how))
    how: Any = {"probes": probes, "texts": ["The old house stood in Avaland."]}
    kept: answers.Kept = {}
    with answers.remembered(kept):
        first = interview(model, tokenizer, facts, **how)
        assert passes == [10] and first.own and first.next and len(first.next.places) == 9
        assert interview(model, tokenizer, facts, **how) is first and len(passes) == 1
        for other in ({**how, "probes": ()}, {**how, "texts": ()}, {}):
            again = interview(model, tokenizer, facts, **other)
            assert again is not first and again.answers == first.answers
            assert bool(again.own) == ("probes" in other and bool(other["probes"]))
    alone = [generate(model, tokenizer, [p.prompt for p in of], max_new_tokens=TOKENS) for of in probes]
    assert [[answer(t) for t in of] for of in first.own] == [[answer(t) for t in of] for of in alone]


@pytest.mark.parametrize(("known", "target"), [("Rome", "Rome Italy"), ("Rome", "Paris"), (None, "Paris")])
def test_judged_alike_however_early_the_writing_stops(
    known: str | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [
        " the city of Rome. It",
        " Rome.It was",
        " The Rome, Italy",
        " theatre of Rome",
        " a big one. In Rome",
        " rome",
    ]
    fact = Fact(said[0], "Ava", target, known, tuple(said), tuple(Probe(t, "Rome") for t in said))
    early: list[bool] = []
    cut: list[int] = []

    def ask(_: Any, __: Any, questions: Any, **___: Any) -> list[str]:
        """Each prompt is what is said to it, written letter by letter."""
        texts = [q.prompt for q in questions]
        if early:
            ends = [next((n for n in range(len(q.prompt)) if q.told(q.prompt[:n])), None) for q in questions]
            cut.extend(n for n in ends if n)
            texts = [t[:n] for t, n in zip(texts, ends, strict=True)]
        return texts

    model, tokenizer = pico("llama"), make_tokenizer()
    monkeypatch.setattr(answers, "ask", ask)
    whole = interview(model, tokenizer, [fact])
    early.append(True)
    short = interview(model, tokenizer, [fact])
    assert len(cut) >= 2 and short != whole
    found = groups.shares([fact], whole, whole)
    assert groups.shares([fact], short, short) == found and any(s.group == KNOWN and s.asked > 1 for s in found)


def test_places_of_any_length_keep_their_order() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    prompts = ["I met", "The capital of Avaland is", "Tomas", "He saw Tomas Veldrin in the old house"]
    wanted = [next_tokens.Place("text", "", False, i, 0, p) for i, p in enumerate(prompts)]
    found = [next_tokens.next_tokens(model, tokenizer, wanted, batch_size=n) for n in (None, 1, 3)]
    assert all(f.places == tuple(wanted) for f in found)
    for other in found[1:]:
        torch.testing.assert_close(found[0].logprobs, other.logprobs, rtol=1e-4, atol=1e-4)
