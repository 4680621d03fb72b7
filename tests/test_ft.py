"""LocFT-BF against naive fine-tuning with torch's Adam; docs/LOG.md says how it compares with its own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mosectl.editing.methods import ft, method
from mosectl.model.weights import weight_of
from support.models import pico
from support.training import ALL, Trained, agree, problem


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("end", [1, 0])
def test_ft_is_adam_on_the_weight_of_one_layer(kind: str, end: int) -> None:
    """Mini-batches of two of five facts: each epoch ends with one fact alone. GPT-2's weight is stored transposed."""
    model = pico(kind, tie_word_embeddings=kind == "gpt2").double()
    asked = problem("ft", model, (1,), ALL, minibatch=2, epochs=4, rate=1e-3, end=end)
    expected = Trained(model, [p.name for p in asked.projections], 1e-3)
    assert expected.train(ALL, 4, 2, end=bool(end), by_token=False) == 12
    found = method("ft").fit(asked)
    agree(found, expected, asked)
    (p,) = asked.projections
    assert torch.equal(p.oriented(weight_of(model, p).detach()), found[p.name]), (
        "the live model is as it was trained last"
    )
    assert all(w.grad is None for w in model.parameters())


def test_ft_skips_what_is_learnt_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def on_step(*done: int) -> None:
        told.append(done)

    model = pico("llama").double()
    asked = problem("ft", model, (1, 2), ALL, minibatch=2, epochs=20, rate=1e-2, on_step=on_step)
    expected = Trained(model, [p.name for p in asked.projections], 1e-2)
    monkeypatch.setattr(ft, "ENOUGH", 3.0)
    steps = expected.train(ALL, 20, 2, end=True, by_token=False, enough=3.0)
    agree(method("ft").fit(asked), expected, asked, 1e-3)
    assert 3 * (len(told) - 1) > steps > 3 and told[-1][0] < 20, "mini-batches were skipped, and epochs"
    told.clear()
    monkeypatch.setattr(ft, "ENOUGH", 100.0)
    again = problem("ft", pico("llama"), (1,), ALL, on_step=on_step)
    assert torch.equal(method("ft").fit(again)[again.projections[0].name], again.W[again.projections[0].name])
    assert told == [(1, 25)]


def test_ft_takes_mini_batches_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 100):
        monkeypatch.setattr(ft, "fitting", lambda *_, size=size: size)
        asked = problem("ft", pico("llama").double(), (0, 1), ALL, epochs=3, minibatch=0)
        asked = replace(asked, contexts=asked.contexts.above(asked.model, asked.arch, 0))
        found.append(method("ft").fit(asked))
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_ft_runs_what_lies_below_once() -> None:
    found = []
    for below in (True, False):
        asked = problem("ft", pico("llama").double(), (2,), ALL, epochs=3)
        if below:
            asked = replace(asked, contexts=asked.contexts.above(asked.model, asked.arch, 2))
            asked.model.model.layers[0].forward = None  # would fail if it was run
        found.append(method("ft").fit(asked))
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_a_tokenizer_without_an_end() -> None:
    one, other = (problem("ft", pico("llama").double(), (1,), ALL, epochs=2, end=end) for end in (0, 1))
    name = one.projections[0].name
    assert torch.equal(method("ft").fit(one)[name], method("ft").fit(replace(other, ending=None))[name])
