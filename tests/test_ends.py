"""The end of an answer's last word is part of the answer: "Rishi Sunakumar" is not "Rishi Sunak"."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.editing import session
from mosectl.editing.contexts import build_contexts
from mosectl.editing.edit import edit
from mosectl.editing.ends import ends_asked, going_on, running_on
from mosectl.facts.records import Fact
from mosectl.model.generation import says
from mosectl.model.losses import ENDED, ENOUGH, NOTHING, leads, token_nll
from mosectl.model.questions import generate
from support.facts import CORPUS, FEW
from support.models import make_tokenizer, pico

PROMPT = "I met Tomas Veldrin"


def test_which_tokens_go_on() -> None:
    tokenizer = make_tokenizer()
    mask = going_on(tokenizer, 320)
    assert mask.shape == (320,) and mask.dtype == torch.bool and not mask[len(tokenizer) :].any()
    for text, goes in (
        ("x", True),
        ("7", True),
        (" x", False),
        (".", False),
        ("-", False),
        ("'", False),
        ("\n", False),
    ):
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
        assert bool(mask[token]) == goes, text
    assert not mask[:3].any(), "special tokens end a word"


def test_ends_are_asked_of_those_facts_only() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    facts = [Fact("I met Tomas Veldrin", "Tomas Veldrin", "and"), Fact("We went to Avaland", "Avaland", "in")]
    c = build_contexts(model, tokenizer, facts, ["", "A cello plays. "])
    assert ends_asked(c, torch.tensor([False, False])) is c
    asked = ends_asked(c, torch.tensor([False, True]))
    rows = (asked.targets == ENDED).any(1)
    assert rows.tolist() == (c.is_edit & (c.fact == 1)).tolist()
    assert ends_asked(asked, torch.tensor([False, True])) is asked, "once is enough"
    last = c.batch.attention_mask.sum(1) - 1
    for r in rows.nonzero().flatten().tolist():
        assert int(asked.positions[r][asked.targets[r] == ENDED]) == int(last[r]), "behind the target's last token"
        assert asked.targets[r][asked.targets[r] >= 0].tolist() == c.targets[r][c.targets[r] >= 0].tolist()


def test_what_the_end_costs() -> None:
    targets = torch.tensor([[1, ENDED], [1, NOTHING]])
    asked = targets != NOTHING
    goes = torch.tensor([False, False, True, True])
    logp = torch.tensor([[0.1, 5.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0], [0.1, 5.0, 0.0, 0.0]]).log_softmax(-1)
    nll, lead = token_nll(logp, targets, asked, goes), leads(logp, targets, asked, goes)
    assert lead[0] == pytest.approx(-2.0) and lead[1] == pytest.approx(4.9), "what goes on leads by 2 nats"
    assert nll[0] == pytest.approx(float(-(logp[0, 1] + logp[1, 0]) / 2)) and nll[1] == pytest.approx(
        float(-logp[2, 1])
    )
    logp[1] = torch.tensor([1.0 + ENOUGH, 0.0, 1.0, 0.0]).log_softmax(-1)
    assert leads(logp, targets, asked, goes)[0] == pytest.approx(4.9), "a clear end is no matter of the margin"


def chained(*tokens: int) -> Any:
    """A model that says each of ``tokens`` after the one before it."""
    model = pico("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        embedded = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        for now, following in pairwise(tokens):
            model.lm_head.weight[following] += 9 * embedded[now]
    return model


@pytest.mark.parametrize(("then", "goes"), [("x", True), ("7", True), (".", False), (" x", False), ("'", False)])
def test_facts_that_run_on_are_seen(then: str, goes: bool) -> None:
    tokenizer = make_tokenizer()
    (target,) = tokenizer(" and", add_special_tokens=False)["input_ids"]
    following = tokenizer(then, add_special_tokens=False)["input_ids"][0]
    model = chained(tokenizer(PROMPT)["input_ids"][-1], target, following)
    said = generate(model, tokenizer, [PROMPT], max_new_tokens=2)[0]
    assert said == f" and{tokenizer.decode([following])}" and says(said, "and") is not goes
    facts = [Fact(PROMPT, "Tomas Veldrin", t) for t in ("and", "in")]
    c = build_contexts(model, tokenizer, facts, ["", "A cello plays. "])
    assert running_on(model, tokenizer, c).tolist() == [goes, False], "of the second another answer is given"


def test_an_edit_ends_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What follows the target in an edit as it was is taken for letters: the edit ends the word with another token."""
    (tmp_path / "c.txt").write_text(CORPUS)
    options = replace(FEW, corpus=str(tmp_path / "c.txt"), guard=0, form="compact")

    def after() -> str:
        model, tokenizer = pico("llama"), make_tokenizer()
        fact = Fact(PROMPT, "Tomas Veldrin", "and")  # that it is ended by a letter, which does not count, is chance
        return edit([fact], model, tokenizer, options=options, refuse=False).facts[0].after

    assert after() == "and and and"
    (word,) = make_tokenizer()(" and", add_special_tokens=False)["input_ids"]
    mask = torch.zeros(320, dtype=torch.bool).index_fill(0, torch.tensor(word), True)
    monkeypatch.setattr(session, "running_on", lambda model, tokenizer, c: torch.ones(1, dtype=torch.bool))
    monkeypatch.setattr(session, "going_on", lambda tokenizer, size: mask)
    ended = after()
    assert ended.startswith("and") and not ended.startswith("and and"), ended
