"""Laws for any input: undo takes apply back, one change of several does what they do, facts and tokens come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosectl.facts.records import Fact, Probe, read_facts
from mosectl.linalg.rotation import nearest_rotation
from mosectl.model.tokens import encode
from mosectl.patch.change import Change, changed, combined, restored
from support.models import make_tokenizer

D, P = 6, 9
LAW = settings(max_examples=60, deadline=None, derandomize=True)


def factors(kind: str, seed: int) -> Change:
    """A change of a (6, 9) weight."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.linalg.qr(normal(n, 2))[0], nearest_rotation(normal(2, 2))

    (U, Q), (U_in, Q_in) = pair(D), pair(P)
    R, R_in = nearest_rotation(normal(D, D)), nearest_rotation(normal(P, P))
    kinds = {
        "output": {"R": R}, "input": {"R_in": R_in}, "both": {"R": R, "R_in": R_in}, "compact": {"U": U, "Q": Q},
        "two compact": {"U": U, "Q": Q, "U_in": U_in, "Q_in": Q_in},
        "dense and compact": {"R": R, "U_in": U_in, "Q_in": Q_in},
        "additive": {"A": normal(2, P), "B": normal(D, 2)},
    }  # fmt: skip
    return Change({name: f.float() for name, f in kinds[kind].items()})


ROTATIONS = st.sampled_from(["output", "input", "both", "compact", "two compact", "dense and compact"])
SEEDS = st.integers(0, 2**31)
SPECTRA = st.lists(st.floats(0.01, 100), min_size=D, max_size=D)


def weight(spectrum: list[float], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    L = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    Z = torch.linalg.qr(torch.randn(P, D, generator=g, dtype=torch.float64))[0]
    return L @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Z.T


@LAW
@given(st.one_of(ROTATIONS, st.just("additive")), SPECTRA, SEEDS)
def test_undo_takes_apply_back(kind: str, spectrum: list[float], seed: int) -> None:
    W = weight(spectrum, seed)
    change = factors(kind, seed + 1)
    # float32 factors are orthogonal to some 1e-6
    assert (change.undo(change.apply(W)) - W).norm() <= 1e-5 * (W.norm() + 1)
    if kind != "additive":
        after = torch.linalg.svdvals(change.apply(W))
        assert torch.allclose(after, torch.linalg.svdvals(W), atol=1e-5 * max(spectrum))


@LAW
@given(st.lists(ROTATIONS, min_size=1, max_size=4), SPECTRA, SEEDS)
def test_one_change_of_several_does_what_they_do(kinds: list[str], spectrum: list[float], seed: int) -> None:
    W = weight(spectrum, seed)
    changes = [factors(kind, seed + i) for i, kind in enumerate(kinds)]
    one = combined(changes)
    assert (changed([one], W) - changed(changes, W)).norm() <= 1e-5 * W.norm()
    assert (restored([one], changed(changes, W)) - W).norm() <= 2e-5 * W.norm()


@LAW
@given(st.integers(1, 4), SPECTRA, SEEDS)
def test_one_addition_of_several_adds_what_they_add(n: int, spectrum: list[float], seed: int) -> None:
    W = weight(spectrum, seed)
    changes = [factors("additive", seed + i) for i in range(n)]
    assert (changed([combined(changes)], W) - changed(changes, W)).norm() <= 1e-5 * (W.norm() + 10 * n)


WORD = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
TEXT = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    subject = draw(TEXT)
    prompt = " ".join((draw(TEXT), subject, draw(TEXT)))
    probes = st.lists(st.builds(Probe, TEXT, TEXT), max_size=2, unique_by=lambda p: p.prompt).map(tuple)
    return Fact(
        prompt, subject, draw(TEXT), rephrase_prompts=tuple(draw(st.lists(TEXT, max_size=2, unique=True))),
        locality=draw(probes), space_before_target=draw(st.sampled_from([None, True, False])),
    )  # fmt: skip


def row(fact: Fact) -> dict[str, Any]:
    out: dict[str, Any] = {"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new}
    out["rephrase_prompts"] = list(fact.rephrase_prompts)
    out["locality"] = [{"prompt": p.prompt, "ground_truth": p.answer} for p in fact.locality]
    if fact.space_before_target is not None:
        out["space_before_target"] = fact.space_before_target
    return out


@pytest.mark.parametrize("whole", [False, True], ids=["jsonl", "json"])
def test_facts_come_back_as_they_were_written(whole: bool, tmp_path: Path) -> None:
    path = tmp_path / ("facts.json" if whole else "facts.jsonl")

    @LAW
    @given(st.lists(facts(), min_size=1, max_size=3, unique_by=lambda f: f.prompt))
    def law(wanted: list[Fact]) -> None:
        rows = [row(f) for f in wanted]
        path.write_text(json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)), encoding="utf-8")
        found = read_facts(path, "report")
        assert not found.skipped, found.problems
        for a, b in zip(found.facts, wanted, strict=True):
            assert row(a) == row(b)

    law()


TOKENIZER = make_tokenizer()


@LAW
@given(facts(), st.sampled_from(["", "Once upon a time. "]))
def test_tokens_hold_the_subject_and_the_target(fact: Fact, prefix: str) -> None:
    e = encode(TOKENIZER, fact.prompt, fact.subject, fact.target_new, prefix=prefix, space=fact.space_before_target)
    alone = encode(TOKENIZER, fact.prompt, None, None, prefix=prefix)
    assert e.input_ids[: e.target_start] == alone.input_ids  # what the model is asked with
    assert 0 < e.subject_first <= e.subject_last < e.target_start < len(e.input_ids)
    subject = TOKENIZER.decode(e.input_ids[e.subject_first : e.subject_last + 1])
    whole = TOKENIZER.decode(e.input_ids[1:])  # without the token that begins a text
    assert fact.subject in subject
    assert whole.startswith(prefix + fact.prompt) and whole.endswith(fact.target_new)
