"""What may help is told from what was given: nobody is sent where they were already."""

from __future__ import annotations

from typing import Any

import pytest

from mosectl.editing.advice import advice
from mosectl.editing.methods import built_in, method
from mosectl.editing.options import options_from


def told(*settings: str, layers: int = 4, facts: int = 10, stopped: str = "", **given: Any) -> str:
    options = options_from(settings, **given)
    return advice(method(options.method), options, layers, facts, stopped)


def test_what_was_given_decides() -> None:
    assert told() == "more --rounds or other --layers"
    assert told(rounds=7) == told() and told(rounds=24) == "other --layers", "many rounds were given"
    assert told(layers=2) == told(), "they were chosen by mosectl"
    assert told(layers=1, **{"rounds": 24}) == "other --layers"
    assert advice(method("isospectral"), options_from([], layers="5", rounds=24), 1, 9) == "more --layers"
    assert (
        advice(method("isospectral"), options_from([], layers="2-5", rounds=24), 4, 9) == "other --layers, such as auto"
    )
    assert told(targets="gradient") == "--targets steps or other --layers"
    assert told("preserve=1000") == "more --rounds, a smaller --set preserve=… or other --layers"
    assert "larger --set rank" in told("rank=8") and "more --set steps" in told("steps=3")
    assert "larger --set max_displacement" in told("max_displacement=1")
    assert "smaller batches (--batch-size 100)" in told(facts=500) and "--batch-size" not in told(
        facts=500, batch_size=100
    )
    assert "larger batches (--batch-size 100)" in told(facts=101, batch_size=20)
    assert told(facts=500) == "more --rounds or smaller batches (--batch-size 100)", (
        "layers that are chosen for many facts"
    )
    assert "--batch-size" not in told(facts=100, batch_size=20) + told(facts=500, batch_size=20, method="alphaedit")


@pytest.mark.parametrize("name", built_in())
def test_rounds_are_for_methods_that_search_by_rounds(name: str) -> None:
    usual = options_from([], method=name)
    rounds = "--rounds" in told(method=name)
    assert rounds == (method(name).searches and not usual.published)
    assert told(method=name) and told(method=name, layers=1).count("--layers") <= 1


def test_a_run_that_the_guard_has_ended_is_not_pushed_further() -> None:
    assert "--rounds" not in told(stopped="ordinary text became less likely") and "preserve" in told(stopped="x")
