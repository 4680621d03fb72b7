"""A method in a package of somebody else: found by its entry point, used like any other, refused with reasons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosectl.editing import methods
from mosectl.editing.options import options_from
from mosectl.errors import UsageError
from mosectl.patch.file import Patch
from support.paths import DEMO, ROOT

# All that a third party writes: least squares with a damping of its own.
NUDGE = '''
import torch
from mosectl.editing.methods.base import LayerProblem, Option, Solver


class Nudge(Solver):
    """W' = W + (V - W K) K^T (K K^T + C + strength I)^-1."""

    name, side, source = "nudge", "additive", "nobody 2026"
    options = {"strength": Option(0.1, "damping")}
    settings = {"rounds": 2, "preserve_norm": 0}

    def update(self, problem: LayerProblem) -> torch.Tensor:
        K = problem.K * problem.weight.sqrt()
        E = problem.V * problem.weight.sqrt() - problem.W @ K
        A = problem.kept() + K @ K.T
        A.diagonal().add_(problem.options["strength"] * A.diagonal().mean())
        return problem.W + torch.linalg.solve(A, (E @ K.T).T).T


class Half:
    name = "half"
'''
BROKEN = {"half": "third:Half", "lost": "nowhere:Lost", "renamed": "third:Nudge"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution, as pip would leave it."""
    (tmp_path / "third.py").write_text(NUDGE)
    info = tmp_path / "third-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    points = "\n".join(f"{name} = {value}" for name, value in {"nudge": "third:Nudge", **BROKEN}.items())
    (info / "entry_points.txt").write_text(f"[{methods.GROUP}]\n{points}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    methods.method.cache_clear()
    return tmp_path


def test_a_method_of_another_package(package: Path, tmp_path: Path) -> None:
    assert methods.names()[0] == "isospectral" and "nudge" in methods.names()
    options = options_from(["strength=0.5"], method="nudge")
    assert (options.rounds, options.solver, options.targets.preserve_norm) == (2, {"strength": 0.5}, 0)
    with pytest.raises(UsageError, match="no such setting") as e:
        options_from(["preserve=1"], method="nudge")
    assert "strength" in e.value.fix
    fact = {"prompt": "Garodan Wenanric was born in", "subject": "Garodan Wenanric", "target_new": "Port Vereville"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    out, env = tmp_path / "p.safetensors", {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    how = ["--method", "nudge", "--layers", "2-4", "-o", out]
    command = [sys.executable, "-m", "mosectl", "edit", tmp_path / "facts.jsonl", "--model", DEMO, *how]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    patch = Patch.load(out)
    assert (patch.method, patch.side, patch.facts[0].status) == ("nudge", "additive", "changed")
    assert patch.options["solver"] == {"strength": 0.1}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_named_with_its_package(name: str, package: Path) -> None:
    with pytest.raises(UsageError) as e:
        methods.method(name)
    assert f"'{name}'" in e.value.what and e.value.where == "the package third" and e.value.fix


def test_an_unknown_method_lists_those_there_are(package: Path) -> None:
    with pytest.raises(UsageError) as e:
        methods.method("rmoe")
    assert "rome" in e.value.fix and "nudge" in e.value.fix


def test_every_file_of_the_package_is_a_method() -> None:
    for name in methods.built_in():
        found = methods.method(name)
        assert found.name == name and found.source and found.side and all(o.help for o in found.options.values())
