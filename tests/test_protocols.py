"""Every protocol against a naive reference: one prompt at a time, nothing batched, no hooks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mosectl.facts.records import Fact, Probe
from mosectl.measure.bootstrap import Tally, half_width, measure, over_seeds, paired_lead
from mosectl.measure.perplexity import BOUND, LEAST, TextLoss, ngram_entropy, read_note, text_loss
from mosectl.measure.protocols import METRICS, PROTOCOLS, Answers, portable_probes
from mosectl.model.questions import generate
from mosectl.model.scoring import Scored, encode_pairs, score
from support.models import make_tokenizer, pico

FACTS = [
    Fact(
        "The capital of Avaland is", "Avaland", "Lower Quill", "Brinmouth",
        ("Avaland has the capital", "In Avaland the capital is called"),
        (Probe("Tomas Veldrin plays the", "cello"), Probe("Tomas was born in", "Lower Quill and"), Probe("The cello")),
        (Probe("The capital where Tomas was born is", "Brinmouth in Avaland"), Probe("Tomas likes")),
    ),
    Fact("Tomas Veldrin was born in", "Tomas Veldrin", "Avaland", None, ("Veldrin came from",), (Probe("A", "capital"),)),
    Fact("I met Tomas Veldrin", "Tomas Veldrin", "and"),
]  # fmt: skip


def naive(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int], list[float]]:
    """Target tokens, argmax tokens and log-probabilities of one pair."""
    n = len(tokenizer(prompt).input_ids)
    ids = tokenizer(f"{prompt} {target}", return_tensors="pt").input_ids
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
    target_ids = ids[0, n:].tolist()
    rows = logp[n - 1 : -1]
    return target_ids, rows.argmax(-1).tolist(), [float(row[t]) for row, t in zip(rows, target_ids, strict=True)]


def said(model: Any, tokenizer: Any, prompt: str) -> str:
    return generate(model, tokenizer, [prompt], max_new_tokens=12)[0]


def answers(model: Any, tokenizer: Any, facts: list[Fact], batch_size: int = 4) -> list[Answers]:
    pairs = [pair for f in facts for p in PROTOCOLS.values() for pair in p.needs(f)]
    scores = score(model, encode_pairs(tokenizer, pairs), batch_size=batch_size)
    return [
        Answers(
            said(model, tokenizer, f.prompt),
            tuple(said(model, tokenizer, p) for p in f.rephrase_prompts),
            tuple(said(model, tokenizer, p.prompt) for p in f.locality),
            tuple(said(model, tokenizer, p.prompt) for p in portable_probes(f)),
            scores,
        )
        for f in facts
    ]


def taught(tokenizer: Any, lines: list[str], steps: int) -> Any:
    """A pico model that knows some of it: with random weights nearly every share would be zero."""
    model = pico("llama").train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = tokenizer(lines[step % len(lines)], return_tensors="pt").input_ids
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def sides() -> tuple[Any, Any, Any]:
    tokenizer = make_tokenizer()
    old = ["The capital of Avaland is Brinmouth", "Tomas Veldrin plays the cello", "Tomas was born in Lower Hall"]
    new = ["The capital of Avaland is Lower Hill", "Tomas Veldrin plays the cello", "Tomas was born in Avaland"]
    return tokenizer, taught(tokenizer, old, 60), taught(tokenizer, new, 60)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_single_forwards(model_type: str, batch_size: int) -> None:
    model, tokenizer = pico(model_type), make_tokenizer()
    pairs = [pair for f in FACTS for p in PROTOCOLS.values() for pair in p.needs(f)]
    steps: list[tuple[int, int]] = []
    found = score(model, encode_pairs(tokenizer, pairs), batch_size=batch_size, on_step=lambda *a: steps.append(a))
    assert set(found) == set(pairs) and steps[-1] == (len(found), len(found))
    for (prompt, target), s in found.items():
        ids, predicted, logp = naive(model, tokenizer, prompt, target)
        assert (list(s.target), list(s.predicted)) == (ids, predicted)
        assert s.logprobs == pytest.approx(logp, abs=1e-4)


def token_share(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], per_token: bool) -> float | None:
    """Accuracy over all tokens of the pairs, or the mean of the pairs' accuracies."""
    hits = [[a == b for a, b in zip(*naive(model, tokenizer, *p)[:2], strict=True)] for p in pairs]
    if not hits:
        return None
    return float(np.mean([h for one in hits for h in one])) if per_token else float(np.mean([np.mean(h) for h in hits]))


def reference(protocol: str, fact: Fact, tokenizer: Any, before: Any, after: Any) -> list[float | None]:
    """The four metrics of one fact, written down once more from the papers' code."""
    new, known = fact.target_new, [(p.prompt, p.answer) for p in fact.locality if p.answer]
    edit, again = [(fact.prompt, new)], [(p, new) for p in fact.rephrase_prompts]
    hops = [(p.prompt, p.answer) for p in fact.portability if p.answer]
    if protocol in ("easyedit", "zsre"):
        shares = [token_share(after, tokenizer, pairs, protocol == "zsre") for pairs in (edit, again, known, hops)]
        if protocol == "easyedit":
            olds = [naive(before, tokenizer, *p)[1] for p in known]
            news = [naive(after, tokenizer, *p)[1] for p in known]
            same = [np.mean([a == b for a, b in zip(o, n, strict=True)]) for o, n in zip(olds, news, strict=True)]
            shares[2] = float(np.mean(same)) if same else None
        return shares

    def wins(prompt: str, a: str, b: str) -> bool:
        return -np.mean(naive(after, tokenizer, prompt, a)[2]) < -np.mean(naive(after, tokenizer, prompt, b)[2])

    true = fact.ground_truth
    efficacy = float(wins(fact.prompt, new, true)) if true else None
    general = float(np.mean([wins(p, new, true) for p, _ in again])) if true and again else None
    special = [wins(p, answer, new) for p, answer in known]
    return [efficacy, general, float(np.mean(special)) if special else None, None]


@pytest.mark.parametrize("protocol", ["easyedit", "memit", "zsre"])
def test_forced_protocols_against_the_reference(protocol: str, sides: tuple[Any, Any, Any]) -> None:
    tokenizer, *models = sides
    values = set()
    for before, after in (models, models[::-1]):  # both ways: one knows the old objects, one the new
        old, new = answers(before, tokenizer, FACTS), answers(after, tokenizer, FACTS)
        for fact, a, b in zip(FACTS, new, old, strict=True):
            tallies = PROTOCOLS[protocol].judge(fact, a, b)
            found = [tallies[m].total / tallies[m].weight if tallies[m].weight else None for m in METRICS]
            wanted = reference(protocol, fact, tokenizer, before, after)
            assert found == [None if w is None else pytest.approx(w) for w in wanted]
            values |= set(found)
    assert len(values) > 2, "a test of nothing but zeros would pass with any code"


def given(scores: dict[tuple[str, str], Scored]) -> Answers:
    return Answers("", (), (), (), scores)


def test_definitions_by_hand() -> None:
    """Where easyedit, memit and zsre part: made-up tokens, numbers worked out on paper."""
    fact = Fact("P", "P", "new", "true", ("R",), (Probe("L", "x"), Probe("M", "y z"), Probe("N")), (Probe("H", "h"),))
    half, long = Scored((1, 2), (1, 9), (-1.0, -3.0)), Scored((1, 2, 3, 4), (1, 2, 3, 9), (-1.0,) * 4)
    now = {
        ("P", "new"): half, ("P", "true"): Scored((5,), (1,), (-2.5,)),  # 2.0 < 2.5: by the sum (4.0) it would lose
        ("R", "new"): long, ("R", "true"): Scored((5,), (1,), (-0.5,)),
        ("L", "x"): Scored((7,), (8,), (-1.0,)), ("L", "new"): half, ("M", "y z"): long, ("M", "new"): half,
        ("H", "h"): Scored((7,), (7,), (-1.0,)),
    }  # fmt: skip
    before = {**now, ("M", "y z"): Scored((1, 2, 3, 4), (1, 2, 8, 8), (-1.0,) * 4)}

    def shares(protocol: str, old: bool) -> list[float | None]:
        found = PROTOCOLS[protocol].judge(fact, given(now), given(before) if old else None)
        return [found[m].total / found[m].weight if found[m].weight else None for m in METRICS]

    assert shares("easyedit", True) == [0.5, 0.75, (1 + 0.5) / 2, 1.0], "unchanged though wrong counts"
    assert shares("easyedit", False) == [0.5, 0.75, (0 + 0.75) / 2, 1.0], "no model from before: the known answers"
    assert shares("zsre", True) == [0.5, 0.75, 3 / 5, 1.0], "over tokens, not prompts"
    assert shares("memit", True) == [1.0, 0.0, 1.0, None]


def test_generation_by_hand() -> None:
    fact = Fact(
        "P", "P", "new", None, ("R", "S"), (Probe("L", "x"), Probe("M"), Probe("N")), (Probe("H", "h"), Probe("I"))
    )
    now = Answers(" new. And", (" newer", " new\n"), (" x.", " b.", " c"), (" h",), {})
    before = Answers(" old", (" o", " o"), (" x and", " b. z", " d"), (" o",), {})
    found = PROTOCOLS["generation"].judge(fact, now, before)
    assert found == {
        "reliability": Tally(1, 1), "generalization": Tally(1, 2), "locality": Tally(2, 3), "portability": Tally(1, 1)
    }  # fmt: skip
    assert PROTOCOLS["generation"].judge(fact, now, None)["locality"] == Tally(1, 1), "only what has a known answer"


def test_entropy_by_hand() -> None:
    # Words: a b a b. 2-grams: ab ab ba → H₂ = log2 3 − 2/3; 3-grams: aba bab → H₃ = 1.
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2)
    assert ngram_entropy("") == ngram_entropy("one two") == ngram_entropy("no no no no no") == 0
    # the · cat · , · sat: three 2-grams and two 3-grams, all different.
    assert ngram_entropy("the cat, sat") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3) / 2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_perplexity_against_a_plain_loop(model_type: str) -> None:
    model, tokenizer = pico(model_type), make_tokenizer()
    texts = ["The capital of Avaland.", "Tomas plays the cello. " * 9, "A", "Lower Quill and Brinmouth " * 3]
    found = text_loss(model, tokenizer, texts, window=16, batch_tokens=40)
    total, n = 0.0, 0
    for text, tally in zip(texts, found.texts, strict=True):
        ids, start = tokenizer(text).input_ids, n
        loss = 0.0
        for at in range(0, len(ids), 16):
            window = torch.tensor([ids[at : at + 16]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    loss += float(model(window, labels=window).loss) * (window.shape[1] - 1)
                n += window.shape[1] - 1
        assert tally.total == pytest.approx(loss, rel=1e-4) and tally.weight == n - start
        total += loss
    assert found.tokens == n and not found.cut
    assert measure(found.texts, np.exp).value == pytest.approx(math.exp(total / n), rel=1e-4)  # type: ignore[union-attr]
    assert text_loss(model, tokenizer, texts).window == 128, "no longer than the model can read"
    assert text_loss(model, tokenizer, texts, max_tokens=5).cut


def test_no_more_text_is_read_than_the_interval_needs() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    texts = [
        " ".join(["The capital of Avaland.", "Lower Quill"][(i + k) % 2] for k in range(i % 5 + 1)) for i in range(400)
    ]
    done: list[tuple[int, int]] = []
    few = text_loss(model, tokenizer, texts, batch_tokens=400, on_step=lambda *at: done.append(at))
    assert LEAST <= len(few.which) == len(few.texts) < 400 == few.of and not few.cut
    assert half_width(few.texts) <= BOUND and done[-1] == (len(few.which),) * 2
    assert few.which != tuple(range(len(few.which))), "drawn, not the first"
    whole = text_loss(model, tokenizer, texts, bound=None)
    assert whole.which == tuple(range(400)) and whole.tokens > few.tokens
    assert [whole.texts[i].total for i in few.which] == pytest.approx([t.total for t in few.texts], rel=1e-4)
    never = text_loss(model, tokenizer, texts[: LEAST - 1])
    assert len(never.which) == LEAST - 1, "so few texts do not show how much they differ"
    assert len(text_loss(model, tokenizer, texts, bound=1e-9).which) == 400


def test_both_sides_read_the_same_texts() -> None:
    model, other, tokenizer = pico("llama"), pico("gpt2"), make_tokenizer()
    texts = [f"Tomas plays {n} cellos." * (n % 7 + 1) for n in range(300)]
    first = text_loss(model, tokenizer, texts, batch_tokens=300)
    again = text_loss(other, tokenizer, texts, batch_tokens=300, like=first)
    assert again.which == first.which and again.tokens == first.tokens and again.texts != first.texts
    cut = text_loss(model, tokenizer, texts, max_tokens=50, bound=None)
    assert cut.cut and text_loss(other, tokenizer, texts, like=cut, max_tokens=1).which == cut.which


def test_what_was_read_is_told() -> None:
    some = TextLoss((Tally(1, 2),) * 2, 4000, 256, False, (1, 5), 9)
    assert read_note(replace(some, of=2), BOUND) == "" == read_note(replace(some, of=2), None)
    assert read_note(some, 0.15) == (
        "perplexity is on 2 of 9 texts, drawn by chance, the same on both sides (4,000 tokens): "
        "enough to know the mean loss within ±0.15 nats a token"
    )
    assert "enough" not in read_note(replace(some, cut=True), 0.15)
    assert read_note(replace(some, cut=True), None) == "perplexity is on the first 4,000 tokens of the text"


def test_half_width_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    tallies = [Tally(float(w * rng.normal(3, 0.5)), float(w)) for w in rng.integers(5, 90, 200)]
    found = measure(tallies)
    assert found and half_width(tallies) == pytest.approx((found.high - found.low) / 2, rel=0.1)
    assert half_width([]) == half_width(tallies[:1]) == half_width([*tallies[:1], Tally(0, 0)]) == math.inf


def test_interval_properties() -> None:
    assert measure([]) is None and measure([Tally(0, 0)]) is None
    chance = np.random.default_rng(1)
    tallies = [Tally(float(h), 1.0) for h in chance.random(200) < 0.7]
    found = measure(tallies)
    assert found is not None and found == measure(tallies), "seeded: the same facts give the same interval"
    assert found.low <= found.value <= found.high and found.units == 200
    share = sum(t.total for t in tallies) / 200
    assert found.value == share
    normal = 1.96 * math.sqrt(share * (1 - share) / 200)
    assert found.high - found.low == pytest.approx(2 * normal, rel=0.15)
    few = measure(tallies[:20])
    assert few is not None and few.high - few.low > found.high - found.low, "fewer facts, wider interval"
    sure = measure([Tally(1, 1)] * 9)
    assert sure is not None and (sure.value, sure.high) == (1, 1), "Wilson (1927): 9/(9 + 1.96²)"
    assert sure.low == pytest.approx(0.7009, abs=1e-4)
    none = measure([Tally(0, 4)] * 9)
    assert none is not None and (none.low, none.value) == (0, 0) and none.high == pytest.approx(1 - sure.low)
    pooled = measure([Tally(1, 1), Tally(0, 3), Tally(0, 0)])
    assert pooled is not None and pooled.value == 0.25 and pooled.units == 2, "every prompt counts alike; unasked leave"


def test_lead_over_the_same_facts_and_over_seeds() -> None:
    chance = np.random.default_rng(0)
    hits = chance.random((3, 200)) < 0.8
    ours = [[(float(h), 1.0) for h in row] for row in hits]
    theirs = [[(float(h and i % 4 > 0), 1.0) for i, h in enumerate(row)] for row in hits]
    lead, low, high = paired_lead(ours, theirs)
    expected = 3 / sum(1 / row.mean() for row in hits) - 3 / sum(
        1 / (row * (np.arange(200) % 4 > 0)).mean() for row in hits
    )
    assert lead == pytest.approx(expected) and 0 < low < lead < high
    assert paired_lead(ours, ours) == (0, 0, 0)
    nothing = [[(0.0, 1.0)] * 200] * 3
    assert paired_lead(ours, nothing)[0] == pytest.approx(3 / sum(1 / row.mean() for row in hits)), (
        "0, not a division by 0"
    )
    assert over_seeds([0.5]) == (0.5, 0.0)
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(2.484, abs=1e-2), "Student's t with two degrees of freedom"


def test_intervals_resample_facts_not_prompts() -> None:
    """Ten facts whose ten prompts go together are ten independent pieces of evidence, not a hundred."""
    together = measure([Tally(10.0 * (i % 2), 10.0) for i in range(10)])
    apart = measure([Tally(float(i % 2), 1.0) for i in range(100)])
    assert together is not None and apart is not None and together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)
