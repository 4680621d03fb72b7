"""The numbered examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("0*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.stem for s in SCRIPTS])
def test_example(script: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = []
    if script.stem == "04_train_editor":
        arguments = ["--steps", "20", "--edit", "40", "--out", str(tmp_path)]
    if script.stem == "05_real_model":  # its own model would be downloaded
        arguments = [str(request.getfixturevalue("shared") / "models" / "factlm")]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
