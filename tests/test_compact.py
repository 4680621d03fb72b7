"""Compact rotations: their algebra (property tests, float64), how they are cut down, and the compact form of an edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mosectl
from mosectl.checkpoints.inspection import inspect
from mosectl.editing.low_rank import compact_change
from mosectl.editing.methods import method
from mosectl.editing.options import default_options, options_from
from mosectl.errors import UsageError
from mosectl.linalg.rotation import (
    Compact,
    as_compact,
    compressed,
    conjugated,
    is_rotation,
    nearest_rotation,
    orthogonality_error,
    product,
)
from mosectl.patch.change import Change, changed, restored
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico
from support.problems import random

sizes = st.tuples(st.integers(2, 24), st.integers(0, 10**6)).flatmap(
    lambda t: st.tuples(st.just(t[0]), st.integers(1, t[0]), st.integers(1, t[0]), st.just(t[1]))
)  # n, two ranks up to n, a seed


def rotation(n: int, r: int, seed: int) -> Compact:
    return Compact(torch.linalg.qr(random(n, r, seed=seed))[0], nearest_rotation(random(r, r, seed=seed + 1)))


def close(A: Tensor, B: Tensor) -> bool:
    return torch.allclose(A, B, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_the_algebra_of_compact_rotations(size: tuple[int, int, int, int]) -> None:
    n, r, s, seed = size
    A, B, W = rotation(n, r, seed), rotation(n, s, seed + 2), random(n, 5, seed=seed + 4)
    a, b = A.dense(), B.dense()
    assert is_rotation(a) and orthogonality_error(a) < 1e-13
    assert close(a, torch.eye(n).double() + A.U @ (A.Q - torch.eye(r)) @ A.U.T)
    assert close(A.left(W), a @ W) and close(A.right(W.T), W.T @ a)
    assert close(A.inverse.dense(), a.T)
    both = product(A, B)
    assert close(both.dense(), a @ b) and both.rank <= min(n, r + s)
    assert close(both.U.T @ both.U, torch.eye(both.rank).double())
    assert close(product(A, A.inverse).dense(), torch.eye(n).double())
    assert close(conjugated(B, A).dense(), a @ b @ a.T) and conjugated(B, A).rank == s


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from([0.5, 0.1, 1e-3, 1e-8]))
def test_compression_keeps_its_tolerance_and_is_orthogonal(size: tuple[int, int, int, int], tolerance: float) -> None:
    n, r, _, seed = size
    R, X = rotation(n, r, seed), random(n, 3 * n, seed=seed + 3)
    M = X @ X.T
    small, error = compressed(R, M, tolerance)
    effect = torch.linalg.norm((R.dense() - torch.eye(n).double()) @ X)
    left_out = torch.linalg.norm((small.dense() - R.dense()) @ X)
    assert error <= tolerance and float(left_out) == pytest.approx(
        error * float(effect), abs=1e-6 * float(effect) + 1e-9
    )
    assert orthogonality_error(small.dense()) < 1e-12 and small.rank <= r


def test_compression_finds_what_is_of_low_rank() -> None:
    turned = rotation(40, 6, seed=0)
    hidden = as_compact(turned.dense())  # as a full matrix
    small, error = compressed(hidden, torch.eye(40).double(), 1e-9)
    assert small.rank == 6 and error < 1e-9 and close(small.dense(), turned.dense())
    still, error = compressed(as_compact(torch.eye(40).double()), torch.eye(40).double(), 0.1)
    assert still.rank == 1 and error == 0 and close(still.dense(), torch.eye(40).double())


def test_compression_counts_only_what_is_seen() -> None:
    """A turn of directions that nothing is ever written in costs no rank."""
    seen, unseen = torch.zeros(30, 3).double(), torch.zeros(30, 3).double()
    seen[:3], unseen[10:13] = torch.eye(3).double(), torch.eye(3).double()
    R = product(
        Compact(seen, nearest_rotation(random(3, 3, seed=1))), Compact(unseen, nearest_rotation(random(3, 3, seed=2)))
    )
    M = torch.diag(torch.cat([torch.ones(10), torch.zeros(20)])).double()
    small, error = compressed(R, M, 1e-6)
    assert small.rank <= 3 and error < 1e-6


# The compact form of a change


def world(d: int = 24, p: int = 60, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """W0 (d, p), a W of its spectrum that a few facts ask for, and the metric of the keys."""
    from support.problems import problem

    p_ = problem("isospectral", m=n)
    W0, X, K = random(d, p, seed=0) / p**0.5, random(p, 300, seed=1), 3 * random(p, n, seed=2)
    C = X @ X.T / 300
    V = W0 @ K + random(d, n, seed=3)
    asked = replace(
        p_, W=W0, W0=W0, C=C, P=torch.zeros(p, p).double(), Q=torch.zeros(d, p).double(), K=K, V=V,
        weight=torch.ones(n).double(), options={**p_.options, "preserve": 1.0},
    )  # fmt: skip
    return W0, method("isospectral").update(asked), C + K @ K.T


def test_a_compact_pair_of_rotations_keeps_effect_and_spectrum() -> None:
    W0, W, A = world()
    found = compact_change(W0, W, A, "both", 0.2)
    assert found is not None
    change, error = found
    assert change.side() == "both" and set(change.factors) == {"U", "Q", "U_in", "Q_in"}
    made = change.apply(W0)
    root = torch.linalg.cholesky(A)
    assert float(torch.linalg.norm((made - W) @ root) / torch.linalg.norm((W - W0) @ root)) == pytest.approx(
        error, rel=1e-3
    )
    assert error <= 0.2 and change.factors["U_in"].shape[1] < 30
    assert torch.allclose(torch.linalg.svdvals(made), torch.linalg.svdvals(W0), rtol=1e-6)
    assert torch.allclose(change.undo(made), W0, atol=1e-5)
    full = change.dense()
    assert set(full.factors) == {"R", "R_in"} and torch.allclose(full.apply(W0), made, atol=1e-5)


def test_dense_where_compact_is_no_smaller() -> None:
    W0, _, A = world()
    far = nearest_rotation(random(24, 24, seed=9)) @ W0
    assert compact_change(W0, far, A, "output", 1e-9) is None
    assert compact_change(W0, far, A, "both", 1e-9) is None


def test_one_sided_changes_have_a_compact_form_too() -> None:
    W0, _, A = world()
    turned = rotation(24, 4, seed=5).left(W0)
    found = compact_change(W0, turned, A, "output", 1e-6)
    assert found is not None and found[0].factors["U"].shape == (24, 4) and found[0].side() == "output"
    assert torch.allclose(found[0].apply(W0), turned, atol=1e-5)
    found = compact_change(W0, rotation(60, 2, seed=6).right(W0), A, "input", 0.1)
    assert found is not None and found[0].side() == "input" and found[1] <= 0.1


def test_no_change_is_compact() -> None:
    W0, _, A = world()
    for side in ("output", "both"):
        found = compact_change(W0, W0, A, side, 0.1)
        assert found is not None and found[1] == 0 and torch.allclose(found[0].apply(W0), W0)


def test_forms_mix_in_a_stack() -> None:
    W = random(24, 60, seed=0)
    R = rotation(24, 5, seed=1)
    a = Change({"U": R.U.float(), "Q": R.Q.float()})
    b = Change({"R": rotation(24, 24, seed=2).Q.float()})
    both = changed([a, b], W)
    assert torch.allclose(both, b.factors["R"].double() @ R.dense() @ W, atol=1e-5)
    assert torch.allclose(restored([a, b], both), W, atol=1e-5)
    assert Change({"U": R.U}).side() is None and Change({"U": R.U, "Q": R.Q, "R": R.Q}).side() is None


@pytest.fixture
def corpus(tmp_path: object) -> str:
    file = tmp_path / "corpus.txt"  # type: ignore[operator]
    file.write_text(CORPUS)
    return str(file)


def test_an_edit_in_each_form(corpus: str, tmp_path: object) -> None:
    patches = {}
    for form in ("dense", "compact", "auto"):
        result = mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=few(corpus, form=form))
        assert [r.status for r in result.facts] == ["changed", "changed"], "the second ends its word: that is asked for"
        assert all(s.spectrum_drift < 1e-4 for s in result.stability)
        patches[form] = result.patch
    assert all(set(c.factors) == {"R", "R_in"} for c in patches["dense"].changes.values())
    small = patches["compact"]
    assert not small.metrics["compaction"], "sought as it is stored: nothing was left out"
    assert sum(c.nbytes for c in patches["auto"].changes.values()) <= sum(
        c.nbytes for c in patches["dense"].changes.values()
    )
    file = tmp_path / "p.safetensors"  # type: ignore[operator]
    small.save(file)
    for r in inspect(file).factors:
        if r.form == "compact":
            assert r.left_out is None
            assert r.orthogonality_error is not None and r.orthogonality_error < 1e-5


def test_a_form_that_loses_answers_is_tightened_then_given_up(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For methods whose dense rotations are cut down afterwards."""
    asked: list[float] = []

    def useless(W0: Tensor, W: Tensor, A: Tensor, side: str, tolerance: float) -> tuple[Change, float]:
        asked.append(tolerance)
        return Change({"U": torch.eye(W0.shape[0])[:, :1], "Q": torch.ones(1, 1)}), 1.0

    monkeypatch.setattr("mosectl.editing.edited_layers.compact_change", useless)
    how = {"compaction": 0.4, "method": "mose", "targets": replace(default_options("mose").targets, steps=40)}
    result = mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=few(corpus, **how))
    assert asked == [t for t in (0.4, 0.2, 0.1, 0.05) for _ in range(3)], "three layers"
    assert all(set(c.factors) == {"R"} for c in result.patch.changes.values())
    assert not result.patch.metrics["compaction"]
    forced = mosectl.edit(
        FACTS, pico("llama"), make_tokenizer(), options=few(corpus, form="compact", **how), refuse=False
    )
    assert forced.scores.reliability == 0.0 < result.scores.reliability and forced.patch.metrics["compaction"]


def test_unknown_form() -> None:
    with pytest.raises(UsageError, match="--form small: no such form"):
        options_from([], form="small")
