"""What inspect says of a patch, whatever its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosectl.checkpoints.inspection import inspect
from mosectl.patch.change import Change
from mosectl.render import console
from support.patches import wide


def test_a_wide_addition_is_inspected_in_its_own_size(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    n = 100_000
    factors = {"A": torch.randn(2, n, generator=g), "B": torch.randn(n, 2, generator=g)}
    replace(wide(n), changes={"layers.a": Change(factors)}, side="additive").save(tmp_path / "p")
    (found,) = inspect(tmp_path / "p").factors
    A, B = factors["A"].double(), factors["B"].double()
    assert found.rank == 2 and found.shape == (n, n)
    assert found.distance == pytest.approx(float(((A @ A.T) * (B.T @ B)).sum()) ** 0.5)


def test_a_terminal_draws_so_much_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.table("T", ("a", "b"), [("x" * 5000, "y")] * 3000)
    told = capsys.readouterr().out
    assert "… and 2901 more" in told and len(told) < 1_000_000
    monkeypatch.delenv("FORCE_COLOR")
    console.table("T", ("a", "b"), [("x" * 5000, "y")] * 3000)
    assert capsys.readouterr().out.count("y") == 3000, "a pipe gets all"
