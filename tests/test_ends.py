"""The end of an answer's last word is part of the answer: "Rishi Sunakumar" is not "Rishi Sunak"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_tokenizer, pico
from test_editor import CORPUS, FEW

from mosectl import run
from mosectl.editor import edit
from mosectl.ends import ends_asked, going_on, running_on
from mosectl.evaluate import generate, says
from mosectl.facts import Fact
from mosectl.losses import ENDED, ENOUGH, NOTHING, leads, token_nll
from mosectl.targets import build_contexts

PROMPTS = [
    "I met Tomas Veldrin",
    "Lower Quill is",
    "The capital of Avaland is",
    "Tomas plays the",
    "We went to Brinmouth",
]


def run_on(model: Any, tokenizer: Any) -> Fact:
    """A fact whose target the model says already, but as the beginning of a longer word."""
    for prompt in PROMPTS:
        said = generate(model, tokenizer, [prompt], max_new_tokens=8)[0]
        words = said.split()
        for word in words[:1]:
            for n in range(1, len(word)):
                fact = Fact(
                    prompt, prompt.split()[-2] if prompt.endswith(("is", "the")) else prompt.split()[-1], word[:n]
                )
                if not says(said, word[:n]) and word[:n].isalnum():
                    c = build_contexts(model, tokenizer, [fact], [""])
                    if bool(running_on(model, tokenizer, c)[0]):
                        return fact
    pytest.skip("no such fact with this tokenizer")


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


def test_an_edit_ends_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    fact = run_on(model, tokenizer)
    (tmp_path / "c.txt").write_text(CORPUS)

    def after() -> str:
        from dataclasses import replace

        options = replace(FEW, corpus=str(tmp_path / "c.txt"), guard=0)
        result = edit([fact], model, tokenizer, options=options)
        return result.facts[0].after

    assert says(after(), fact.target_new)
    monkeypatch.setattr(
        run, "running_on", lambda model, tokenizer, c: torch.zeros(int(c.fact.max()) + 1, dtype=torch.bool)
    )
    with pytest.raises(Exception) as e:  # nothing is seen to be wrong, so nothing is changed
        assert says(after(), fact.target_new), "as before"
    assert "nothing" in str(e.value) or "as before" in str(e.value) or "reach" in str(e.value)
