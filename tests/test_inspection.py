"""What inspect says of a patch, whatever its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosectl.checkpoints.inspection import inspect
from mosectl.linalg.rotation import nearest_rotation
from mosectl.patch.change import Change
from mosectl.render import console
from support.commands import run
from support.patches import MODULE, make, wide


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


def test_factors_are_named_as_in_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def turn(n: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(n)
        return nearest_rotation(torch.eye(n).double() + 0.1 * torch.randn(n, n, generator=g).double()).float()

    make(changes={MODULE: Change({"R": turn(8), "R_in": turn(12)})}, side="both").save(tmp_path / "p")
    assert run("inspect", tmp_path / "p") == 0
    told = capsys.readouterr().out
    assert "W' = L W R, or" in told and "R_in" not in told
    assert "mlp.down_proj\tL\tdense\t8×8" in told and "mlp.down_proj\tR\tdense\t12×12" in told
    assert [r.factor for r in inspect(tmp_path / "p").factors] == ["R", "R_in"], "as the file calls them"


@pytest.mark.parametrize("asked", [4, 6])
def test_wordings_that_were_not_edited_along_are_told_where_there_are_others(
    asked: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = [{"metric": "generalization", "group": "", "own": False, "asked": 6, "qa": 1.0, "strict": 0.5}]
    scores = {"unseen": 0.25, "rephrasings_unseen": asked}
    make(metrics={"shares": shares, "scores": scores}).save(tmp_path / "p")
    assert run("inspect", tmp_path / "p") == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["", "share", "as QA compares", "prompts", "meaning"] in rows
    unseen = [row[:4] for row in rows if "unseen wordings" in row[0]]
    assert unseen == ([["  unseen wordings", "25.0%", "–", "4"]] if asked == 4 else [])
