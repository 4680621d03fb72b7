"""The model's own wordings of a fact: found in what the demo model writes, on texts given, and through an edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing import paraphrases
from mosectl.editing.contexts import build_contexts
from mosectl.editing.paraphrases import own_wordings
from mosectl.facts.records import Fact, read_facts
from mosectl.model.generation import answer, says
from mosectl.model.loading import load
from mosectl.model.questions import generate
from mosectl.model.scoring import encode_pairs, score
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico
from support.paths import ROOT

FACT = Fact("The capital of Avaland is", "Avaland", "Lower Quill", "Brinmouth")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" is ruled from Brinmouth.", "Avaland is ruled from"),
        ("'s seat, Brinmouth, and more", "Avaland's seat,"),
        (" Brinmouth is", None),  # nothing in between
        (" is near Brinmouthshire", None),  # another word
        (" is large. Its capital is Brinmouth", None),  # another sentence
        (" is large\nThe capital is Brinmouth", None),
        (" is a country", None),
        (" is a pla\ufffd in Brinmouth", None),  # half a character
    ],
)
def test_what_counts_as_a_wording(text: str, found: str | None) -> None:
    assert list(paraphrases._wordings(FACT, "Brinmouth", [text])) == ([found] if found else [])


def test_the_prompt_itself_and_long_answers_are_no_wordings() -> None:
    plain = replace(FACT, prompt="Avaland is ruled from")
    texts = [" is ruled from Brinmouth", " obeys Brinmouth", " obeys Brinmouth"]
    assert dict(paraphrases._wordings(plain, "Brinmouth", texts)) == {"Avaland obeys": 2}
    long = "a city " * 10
    assert not paraphrases._wordings(FACT, long, [f" is {long}"]) and not paraphrases._wordings(FACT, "", [" is here"])


def test_the_demo_model_words_its_facts() -> None:
    loaded = load(ROOT / "examples" / "demo-model", device="cpu")
    facts = list(read_facts(ROOT / "examples" / "facts.jsonl").facts)[:6]
    texts = generate(loaded.model, loaded.tokenizer, [f.prompt for f in facts])
    before = torch.random.get_rng_state()
    done: list[tuple[int, int]] = []
    asked: Any = (loaded.model, loaded.tokenizer, facts, [answer(t) for t in texts])
    found = own_wordings(*asked, 2, on_step=lambda *at: done.append(at))
    assert done[0] == (0, 6) and done == sorted(done) and len({*done}) > 2, "facts are told of as they are settled"
    assert len(found) == len(facts) and done[-1] == (6, 6) and max(map(len, found)) <= 2
    assert sum(map(bool, found)) >= 3 and torch.equal(before, torch.random.get_rng_state())
    assert found == own_wordings(*asked, 2) and max(map(len, own_wordings(*asked, 1))) == 1
    for fact, own in zip(facts, found, strict=True):
        said = generate(loaded.model, loaded.tokenizer, own) if own else []
        assert all(says(t, fact.ground_truth or "") for t in said), own
        assert all(w.startswith(fact.subject) and w != fact.prompt for w in own)


def test_without_a_known_object_the_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    monkeypatch.setattr(paraphrases, "continuations", lambda _, __, asked, *___, **____: [" is in it"] * len(asked))

    class Sure:
        hits, target = 1, (1,)

    monkeypatch.setattr(paraphrases, "score", lambda _, pairs: dict.fromkeys(pairs, Sure))
    facts = [replace(FACT, ground_truth=None)] * 5
    assert own_wordings(model, tokenizer, facts, ["in"] * 4 + ["none"], 2) == [("Avaland is",)] * 4 + [()]
    Sure.hits = 0  # the model does not go on with it of its own
    assert own_wordings(model, tokenizer, facts[:1], ["in"], 2) == [()]


def test_only_who_lacks_wordings_is_written_about(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    rounds: list[int] = []

    def written(_: Any, __: Any, asked: Any, *___: Any, **____: Any) -> list[str]:
        rounds.append(len(asked))
        return [f" {len(rounds)}{'ab'[i % 2]} in it" if len(asked) < 24 or i < 8 else " or" for i in range(len(asked))]

    class Sure:
        hits, target = 1, (1,)

    monkeypatch.setattr(paraphrases, "continuations", written)
    monkeypatch.setattr(paraphrases, "score", lambda _, pairs: dict.fromkeys(pairs, Sure))
    facts = [
        replace(FACT, subject=s, ground_truth=o)
        for s, o in (("Ava", "in"), ("Bo", "in"), ("Cy", "in"), ("Di", "x" * 99))
    ]
    found = own_wordings(model, tokenizer, facts, [""] * 4, 2)
    assert rounds == [24, 16], "one had enough at once; nothing is ever found for an object that is a sentence"
    assert found == [("Ava 1a", "Ava 1b"), ("Bo 2a", "Bo 2b"), ("Cy 2a", "Cy 2b"), ()]
    rounds.clear()
    monkeypatch.setattr(paraphrases, "continuations", lambda *a, **_: rounds.append(len(a[2])) or [" or"] * len(a[2]))
    assert own_wordings(model, tokenizer, facts, [""] * 4, 2) == [()] * 4
    assert sum(rounds) == 3 * paraphrases.PATIENCE, "given up"
    rounds.clear()
    assert own_wordings(model, tokenizer, facts * 2, [""] * 8, 2) == [()] * 8
    assert sum(rounds) == 6 * paraphrases.ROUND, "given up at once: of many subjects none had any"


def test_where_hardly_any_subject_has_one_the_rest_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    done: list[tuple[int, int]] = []

    def sure(_: Any, __: Any, facts: Any, *___: Any) -> list[tuple[str, ...]]:
        written.extend(f.subject for f in facts)
        return [(f"{f.subject} and",) if int(f.subject) % every == 0 else () for f in facts]

    monkeypatch.setattr(paraphrases, "_sure", sure)
    facts = [replace(FACT, subject=str(i)) for i in range(200)]
    asked: Any = (pico("llama"), make_tokenizer(), facts, [""] * 200, 2)
    every = 20
    found = own_wordings(*asked, on_step=lambda *at: done.append(at))
    assert len(written) == 64 and [i for i, own in enumerate(found) if own] == [0, 20, 40, 60] and len(found) == 200
    assert done[-1] == (200, 200)
    every = 8
    assert sum(map(bool, own_wordings(*asked))) == 25, "one in eight is worth asking for"


def test_wordings_are_rows_of_their_fact() -> None:
    facts = [replace(FACT, prompt="The capital of Avaland is"), replace(FACT, prompt="Avaland is")]
    c = build_contexts(pico("llama"), make_tokenizer(), facts, ["", "Born. "], [["Avaland obeys"], []])
    assert c.fact.tolist() == [0, 0, 0, 0, 1, 1, 1] and c.is_edit.tolist() == [True] * 3 + [False] + [True] * 2 + [
        False
    ]


def test_an_edit_takes_the_wordings_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    given: list[Any] = []

    def found(_: Any, __: Any, facts: Any, answers: Any, most: int, **___: Any) -> list[tuple[str, ...]]:
        given.append((len(facts), len(answers), most))
        return [(f"{f.subject} and",) for f in facts]

    monkeypatch.setattr("mosectl.editing.edit.own_wordings", found)
    model, tokenizer = pico("llama"), make_tokenizer()
    options = few(str(corpus), wordings=3, batch_size=1)
    result = mosectl.edit(FACTS, model, tokenizer, options=options, refuse=False)
    assert given == [(2, 2, 3)] and all(r.wordings == (f"{r.fact.subject} and",) for r in result.facts)
    assert [f.wordings for f in result.patch.facts] == [r.wordings for r in result.facts]
    pairs = encode_pairs(tokenizer, [(r.wordings[0], r.fact.target_new) for r in result.facts])
    before = score(model, pairs)
    with mosectl.patched(model, result.patch):
        after = score(model, pairs)
    assert all(after[pair].nll < before[pair].nll - 0.5 for pair in pairs)
    plain = mosectl.edit(FACTS, model, tokenizer, options=few(str(corpus), wordings=0), refuse=False)
    talk = mosectl.edit(
        FACTS,
        model,
        make_tokenizer(chat_template="{{ messages[0].content }}</s>A: "),
        options=few(str(corpus), wordings=3, chat=True),
        refuse=False,
    )
    assert len(given) == 1 and all(r.wordings == () for r in (*plain.facts, *talk.facts))
