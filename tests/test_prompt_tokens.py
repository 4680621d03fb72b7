"""The facts' own prompts in what must keep still: which tokens, how much they weigh, and what an edit makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mosectl
from mosectl.editing.prompt_tokens import add_prompts
from mosectl.editing.second_moments import Moments
from mosectl.facts.records import Fact, fact_from_dict
from mosectl.model.architecture import resolve
from mosectl.model.weights import turns
from mosectl.patch.change import changed
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico


def fact(prompt: str, subject: str) -> Fact:
    return fact_from_dict({"prompt": prompt, "subject": subject, "target_new": "Brinmouth"}, "here")


def inputs(model: nn.Module, name: str, ids: list[int]) -> Tensor:
    """What the module reads at every token, (tokens, p)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_before_the_subjects_last_are_added(architecture: str) -> None:
    model, tokenizer = pico(architecture), make_tokenizer()
    arch = resolve(model)
    facts = [
        fact("The capital of Tomas Veldrin is", "Tomas Veldrin"),
        fact("The capital of Tomas Veldrin was", "Tomas Veldrin"),  # begins alike: counted once
        fact("Avaland Tomas Veldrin is in", "Avaland Tomas Veldrin"),
        fact("A is in", "A"),  # the subject's last token is the first of all: nothing before it
    ]
    C = {p.name: torch.eye(p.p) for p in arch.projections}
    add_prompts(Moments(C, {}, 0, False, 0.0), model, tokenizer, arch.projections, facts, 3.0)
    begun = [tokenizer(text)["input_ids"] for text in ("The capital of Tomas Veldrin", "Avaland Tomas Veldrin")]
    for p in arch.projections:
        k = torch.cat([inputs(model, p.name, ids)[1:-1] for ids in begun]).double()
        assert len(k) >= 6
        wanted = torch.eye(p.p, dtype=torch.float64) + 3.0 * k.T @ k / len(k)
        torch.testing.assert_close(C[p.name].double(), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_before_or_no_weight_leaves_the_text_alone() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    arch = resolve(model)
    for facts, weight in (([fact("A is in", "A")], 3.0), ([fact("In Avaland", "Avaland")], 0.0)):
        C = {p.name: torch.eye(p.p) for p in arch.projections}
        add_prompts(Moments(C, {}, 0, False, 0.0), model, tokenizer, arch.projections, facts, weight)
        assert all(torch.equal(c, torch.eye(len(c))) for c in C.values())


def test_where_the_prompts_last_token_is_edited_those_before_it_are_added() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    arch = resolve(model)
    C = {p.name: torch.zeros(p.p, p.p) for p in arch.projections}
    given = [fact("I met Avaland in", "Avaland")]
    add_prompts(Moments(C, {}, 0, False, 0.0), model, tokenizer, arch.projections, given, 2.0, last=True)
    k = inputs(model, arch.projections[0].name, tokenizer("I met Avaland in")["input_ids"])[1:-1]
    torch.testing.assert_close(C[arch.projections[0].name], 2.0 * k.T @ k / len(k), rtol=1e-4, atol=1e-5)


def test_experts_of_a_mixture() -> None:
    model, tokenizer = pico("mixtral"), make_tokenizer()
    with turns(model, resolve(model)) as arch:
        C = {p.name: torch.zeros(p.p, p.p) for p in arch.projections}
        given = [fact("The capital of Tomas Veldrin is", "Tomas Veldrin")]
        add_prompts(Moments(C, {}, 0, False, 0.0), model, tokenizer, arch.projections, given, 1.0)
    assert all(float(c.trace()) > 0 and torch.isfinite(c).all() for c in C.values())


def test_an_edit_moves_names_less_where_they_weigh(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS, "utf-8")
    facts = [*FACTS, {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "in"}]
    ids = make_tokenizer()("I met Tomas Veldrin")["input_ids"][:-1]

    def moved(weight: float) -> tuple[float, dict[str, Any]]:
        """How far the edit moves what the lowest edited layer writes for the words before the subject's last token."""
        model, tokenizer = pico("llama"), make_tokenizer()
        options = few(str(corpus), prompt_weight=weight, fact_token="subject_last")
        patch = mosectl.edit(facts, model, tokenizer, options=options, refuse=False).patch
        name, change = min(patch.changes.items())
        W = model.get_submodule(name).weight.detach().double()
        k = inputs(model, name, ids).double()
        return float(((changed([change], W) - W) @ k.T).norm()), patch.options

    (without, plain), (with_prompts, record) = moved(0.0), moved(1e6)
    assert 0 < with_prompts < 0.5 * without
    assert record["prompt_weight"] == 1e6 and "prompt_weight" not in plain
