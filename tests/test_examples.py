"""The numbered examples run as they stand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.paths import DEMO, ROOT

SCRIPTS = sorted((ROOT / "examples").glob("0*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.stem for s in SCRIPTS])
def test_example(script, tmp_path) -> None:
    short = {
        "04_train_editor": ["--steps", "20", "--edit", "40", "--out", str(tmp_path)],
        "05_real_model": [str(DEMO)],  # a real one would be downloaded
    }.get(script.stem, [])
    done = subprocess.run([sys.executable, script, *short], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
