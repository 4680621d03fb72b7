"""Weights that are no numbers: told before they are computed with, and never written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.export import export
from mosectl.checkpoints.inspection import inspect
from mosectl.checkpoints.live import ask, patched
from mosectl.editing.edit import edit
from mosectl.errors import EditFailed, ModelError
from mosectl.linalg.spectrum import Spectrum, stability
from mosectl.model.loading import load
from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from mosectl.patch.finite import is_finite
from support.commands import run
from support.models import save
from support.patches import hashes, patch_for

NAME = "model.layers.0.mlp.down_proj.weight"
FACT = {"prompt": "The capital of Avaland is", "subject": "Avaland", "target_new": "Plum"}


def large(patch: Patch, size: float) -> Patch:
    """An additive patch of finite factors that adds size² everywhere."""
    changes = {}
    for module, made_for in patch.base.items():
        d, p = made_for.shape
        changes[module] = Change({"A": torch.full((1, p), size), "B": torch.full((d, 1), size)})
    return replace(patch, changes=changes, side="additive")


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 300.0)], ids=str
)
def test_what_a_type_cannot_hold_is_not_written(
    dtype: torch.dtype, size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base", dtype=dtype)
    good, bad = patch_for(base, seed=1), large(patch_for(base), size)
    files = [tmp_path / "good.safetensors", tmp_path / "bad.safetensors"]
    for patch, file in zip((good, bad), files, strict=True):
        patch.save(file)
    before = {p.name for p in tmp_path.iterdir()}
    kind = str(dtype).removeprefix("torch.")
    for proof in (True, False):
        with pytest.raises(EditFailed, match=f"patch {bad.id[:12]} makes numbers that {kind} cannot hold") as e:
            apply([good, bad], base, tmp_path / "out", proof=proof)
        assert e.value.where == NAME and ("float32" in e.value.fix) == (kind != "float32")
    for form in ("lora", "merged"):
        with pytest.raises(EditFailed, match=bad.id[:12]):
            export([bad], base, tmp_path / "x", form)
    with pytest.raises(EditFailed, match=bad.id[:12]):
        inspect(files[1], model=base)
    model = load(base, dtype=kind).model
    whole = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(EditFailed, match=bad.id[:12]), patched(model, good, bad, force=True):
        pass
    assert all(torch.equal(p, whole[n]) for n, p in model.named_parameters())
    with pytest.raises(EditFailed, match=bad.id[:12]):
        ask(["x"], base, [bad], dtype=kind)
    assert {p.name for p in tmp_path.iterdir()} == before, "nothing is left"
    assert run("apply", *files, "-m", base, "-o", tmp_path / "out", "--json") == 8
    told = capsys.readouterr()
    assert not told.out and bad.id[:12] in told.err and NAME in told.err


def test_an_adapter_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    with pytest.raises(EditFailed, match="too large for"):
        export([large(patch_for(base), 1e15)], base, tmp_path / "x", dtype=torch.float16)


def test_what_is_left_after_a_revert_is_finite_too(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    up = large(patch_for(base), 1.4e19)  # 2e38 everywhere; float32 ends at 3.4e38
    down = replace(up, changes={m: Change({**c.factors, "B": -c.factors["B"]}) for m, c in up.changes.items()})
    apply([up, down, again := replace(up, seed=1)], base, tmp_path / "out")  # only the sum counts
    now = hashes(tmp_path / "out")
    with pytest.raises(EditFailed, match=f"patch {again.id[:12]} makes numbers that float32 cannot hold"):
        revert(down, tmp_path / "out")
    assert hashes(tmp_path / "out") == now
    assert revert(up, tmp_path / "out").stack == (down.id, again.id)


@pytest.mark.parametrize("kind", ["nan", "inf", "zero"])
def test_weights_that_cannot_be_edited(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    if kind == "zero":
        tensors[NAME].zero_()
    else:
        tensors[NAME][0, 1] = float(kind)  # none of the fingerprint's sample
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    patch = patch_for(base)
    patch.save(file := tmp_path / "p.safetensors")
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT))
    what = "nothing but zeros" if kind == "zero" else "NaN or infinite"
    for command in (
        ("apply", file, "-m", base, "-o", tmp_path / "out", "--json"),
        ("apply", file, "-m", base, "-o", tmp_path / "out", "--no-proof"),
        ("inspect", file, "-m", base, "--json"),
        ("export", file, "-m", base, "-o", tmp_path / "x", "--json"),
        ("export", file, "-m", base, "-o", tmp_path / "x", "--to", "merged"),
        ("edit", tmp_path / "facts.jsonl", "-m", base, "-o", tmp_path / "q.safetensors", "--layers", "0", "--json"),
    ):
        assert run(*command) == 4, command
        told = capsys.readouterr()
        assert not told.out and NAME in told.err and what in told.err, command
    assert {p.name for p in tmp_path.iterdir()} == {"base", "p.safetensors", "facts.jsonl"}
    # Where only other layers are edited, one of zeros does no harm.
    if kind == "zero":
        assert apply([patch_for(base, (1,))], base, tmp_path / "out").stack
    else:
        with pytest.raises(ModelError, match="NaN or infinite"):
            edit([FACT], base)


def test_no_decomposition_of_what_is_not_finite(capfd: pytest.CaptureFixture[str]) -> None:
    W = torch.eye(4, 6)
    bad = W.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(EditFailed, match="NaN or infinite"):
        Spectrum.of(bad)
    assert stability("w", torch.zeros(4, 6), W).norm_drift > 1, "a number, not a crash"
    assert capfd.readouterr().out == ""
    assert is_finite(W) and is_finite(W[:0]) and not is_finite(bad) and not is_finite(W / 0)


SCRIPT = """
import os, sys, warnings
from mosectl.cli import main as cli
def app(standalone_mode):
    os.write(1, b"Intel MKL ERROR: Parameter 4 was incorrect\\n")
    print('{"a": 1}')
    return 0
cli._app = lambda: app
cli.main()
"""


@pytest.mark.parametrize("closed", ["", " 1>&-", " 2>&-"])
def test_what_libraries_print_is_no_result(closed: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        f'"{sys.executable}" script.py' + closed, shell=True, cwd=tmp_path, capture_output=True, env={**os.environ}
    )
    if closed == "":
        assert done.returncode == 0 and done.stdout == b'{"a": 1}\n' and b"Intel MKL" in done.stderr
    if closed == " 2>&-":
        assert b'{"a": 1}' in done.stdout


def test_a_model_that_is_not_finite_spoils_no_json(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[NAME][0, 1] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    patch_for(base).save(tmp_path / "p.safetensors")
    command = [sys.executable, "-m", "mosectl", "inspect", "p.safetensors", "-m", "base", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 4 and done.stdout == b"" and b"MKL" not in done.stderr
