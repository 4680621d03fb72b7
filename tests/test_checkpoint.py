"""What is believed about a model folder: which weights count, and that config and index claim no more than there is."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.audit import verify
from mosectl.checkpoints.base import layout
from mosectl.checkpoints.export import export
from mosectl.editing.diagnosis import diagnose
from mosectl.errors import ModelError, MosectlError, Notice
from mosectl.model.loading import load
from mosectl.storage.checkpoint import INDEX, SINGLE, open_checkpoint, shard_files, twins
from support.commands import run
from support.json_mutations import fuzzing, mutated
from support.models import save
from support.patches import hashes, patch_for

NAME = "model.layers.0.mlp.down_proj.weight"


def marked(file: Path, value: float) -> None:
    """Set an entry by which the file is known, where it holds that weight."""
    tensors = load_file(file)
    if NAME in tensors:
        tensors[NAME][0, 1] = value
        save_file(tensors, file, {"format": "pt"})


def with_files(folder: Path, *kinds: str) -> Path:
    """A checkpoint with its weights in several forms, each known by a number of its own."""
    save(folder)
    for kind in kinds:
        if kind == "index":
            save(folder / "sharded", shard="20KB")
            for file in (folder / "sharded").glob("model*"):
                shutil.copy(file, folder)
            shutil.rmtree(folder / "sharded")
            for file in folder.glob("model-*.safetensors"):
                marked(file, 2.0)
        else:
            shutil.copy(folder / SINGLE, folder / kind)
            marked(folder / kind, {"model.fp16.safetensors": 3.0, "named.safetensors": 4.0}.get(kind, 5.0))
    if "named.safetensors" in kinds:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "named.safetensors"}))
    torch.save({}, folder / "pytorch_model.bin")
    marked(folder / SINGLE, 1.0)
    return folder


FORMS = [
    ((), True, 1.0),
    (("index",), True, 1.0),
    (("index",), False, 2.0),
    (("model.fp16.safetensors",), True, 1.0),
    (("index", "model.fp16.safetensors"), False, 2.0),
    (("index", "named.safetensors"), True, 4.0),
]


@pytest.mark.parametrize(("kinds", "single", "value"), FORMS)
def test_the_weights_are_those_that_transformers_loads(
    kinds: tuple[str, ...], single: bool, value: float, tmp_path: Path
) -> None:
    folder = with_files(tmp_path / "m", *kinds)
    if not single:
        (folder / SINGLE).unlink()
    assert float(open_checkpoint(folder).read(NAME)[0, 1]) == value
    for how in ({}, {"use_safetensors": True}):
        theirs = AutoModelForCausalLM.from_pretrained(folder, **how)
        assert float(theirs.get_parameter(NAME)[0, 1].detach()) == value, how
    assert float(load(folder).model.get_parameter(NAME)[0, 1].detach()) == value


def test_an_edit_has_effect_beside_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = with_files(
        tmp_path / "base", "index", "model.fp16.safetensors", "consolidated.safetensors", "all.safetensors"
    )
    left = {INDEX, "model.fp16.safetensors", "consolidated.safetensors", "all.safetensors", "pytorch_model.bin"}
    left |= {f.name for f in base.glob("model-*")}
    (base / "extra.safetensors").write_bytes(b"something else")
    assert set(twins(open_checkpoint(base))) == left and len(left) > 6
    assert any("pytorch_model.bin" in note for note in diagnose(base).notes)
    original, patch = hashes(base), patch_for(base)
    with pytest.warns(Notice, match=r"hold the unedited weights.*consolidated.*pytorch_model"):
        apply([patch], base, tmp_path / "out")
    there = {f.name for f in (tmp_path / "out").iterdir()}
    assert not there & left and "extra.safetensors" in there, "what another program would load unedited is left out"
    for how in ({}, {"use_safetensors": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
        assert not torch.equal(loaded.get_parameter(NAME), open_checkpoint(base).read(NAME))
    assert all(c.ok for c in verify(tmp_path / "out"))
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"made by the user")
    assert revert(patch, tmp_path / "out").restored and hashes(tmp_path / "out") == original
    assert (tmp_path / "out" / "pytorch_model.bin").exists(), "revert leaves nothing out"
    with pytest.warns(Notice, match="unedited"):
        export([patch], base, tmp_path / "merged", "merged")
    assert not {f.name for f in (tmp_path / "merged").iterdir()} & left
    patch.save(tmp_path / "p")
    capsys.readouterr()
    assert run("doctor", base) == 0 and "consolidated.safetensors" in capsys.readouterr().out


def test_weights_that_transformers_would_take_and_mosectl_does_not_know(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    part = folder / "shard-00001-model-00001-of-00001.safetensors"
    shutil.copy(folder / SINGLE, part)
    with pytest.raises(ModelError, match="distributed training"):
        open_checkpoint(folder)
    part.unlink()
    config = json.loads((folder / "config.json").read_text())
    names = "../m/model.safetensors", "gone.safetensors", "model.bin", "x" * 5000 + ".safetensors"
    for named in (*names, 3, ["model.safetensors"]):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        with pytest.raises(ModelError, match="transformers_weights"):
            open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")
    with pytest.raises(ModelError, match=r"only model\.fp16\.safetensors, which transformers does not load"):
        open_checkpoint(folder)


def test_a_name_that_is_too_long() -> None:
    for name in ("x" * 300, "me/" + "x" * 300):
        with pytest.raises(ModelError, match="no such model folder"):
            open_checkpoint(name)


# Files that are none


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 * 10**9)


def brackets(path: Path) -> None:
    path.write_text("[" * 100_000)


def null(path: Path) -> None:
    path.write_text("null")


@pytest.mark.parametrize("make", [pipe, endless, sparse, brackets, null])
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json", SINGLE])
def test_files_that_are_none(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save(tmp_path / "m", shard="20KB" if name == INDEX else "1GB")
    (folder / name).unlink()
    make(folder / name)
    start = time.perf_counter()
    with pytest.raises(ModelError) as e:
        load(folder)
    assert e.value.fix and str(tmp_path) in e.value.where and time.perf_counter() - start < 5
    assert not ready(folder)


def ready(folder: Path) -> bool:
    """Does doctor find nothing wrong with a folder?"""
    try:
        return not diagnose(folder).problems
    except ModelError:
        return False


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ({"weight_map": {"a": 3}}, "does not name a file"),
        ({"weight_map": {"a": {}}}, "does not name a file"),
        ({"weight_map": {"a": None, "b": "x"}}, "does not name a file"),
        ({"weight_map": {}}, "does not name a file"),
        ({"weight_map": ["a"]}, "does not name a file"),
        ({}, "does not name a file"),
        ([], "not a JSON object"),
        ({"weight_map": {"a": "../x.safetensors"}}, "leaves the folder"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "not a safetensors file"),
        ({"weight_map": {"a": ""}}, "not a safetensors file"),
        ({"weight_map": {"a": "gone.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "is missing"),
    ],
)
def test_an_index_that_names_no_shards(index: Any, what: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", shard="20KB")
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=what) as e:
        shard_files(folder)
    assert e.value.where and e.value.fix


# Claims


@pytest.mark.parametrize("layers", [1_000_000, 90_000, 10**18])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3"])
def test_a_config_claims_no_more_than_the_weights_hold(
    model_type: str, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "m", model_type)
    patch_for(folder).save(tmp_path / "p")
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config", config)
    inner["n_layer" if model_type == "gpt2" else "num_hidden_layers"] = layers
    inner.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    for command in (
        ("doctor", folder),
        ("apply", tmp_path / "p", "-m", folder, "-o", tmp_path / "out"),
        ("inspect", tmp_path / "p", "-m", folder),
        ("ask", "Hello", "-m", folder),
        (
            "edit",
            Path(__file__).parents[1] / "examples" / "facts.jsonl",
            "-m",
            folder,
            "-o",
            tmp_path / "q",
            "--dry-run",
        ),
    ):
        assert run(*command) == 4, command
        assert "config.json" in capsys.readouterr().err
    assert time.perf_counter() - start < 10


def test_more_tensors_on_disk_than_the_model_builds_are_no_claim(tmp_path: Path) -> None:
    """A mixture's experts are one tensor each on disk, and one for all in memory."""
    assert layout(open_checkpoint(save(tmp_path / "m", "mixtral")))


def test_shapes_are_as_the_config_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"shape \[32, 48\], its config.json says \[32, 64\]") as e:
        layout(open_checkpoint(folder))
    assert NAME in e.value.where
    assert not ready(folder)


# Anything at all


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("fuzz") / "m", shard="20KB")


@pytest.mark.slow
def test_any_config(sharded: Path) -> None:
    file = sharded / "config.json"
    good = file.read_bytes()

    @fuzzing
    @given(mutated(json.loads(good)))
    def one(config: Any) -> None:
        file.write_text(json.dumps(config), "utf-8")
        start = time.perf_counter()
        try:
            layout(open_checkpoint(sharded))
        except MosectlError as e:
            assert e.exit_code > 1
        assert time.perf_counter() - start < 10

    try:
        one()
    finally:
        file.write_bytes(good)


@pytest.mark.slow
def test_any_index(sharded: Path) -> None:
    file = sharded / INDEX
    good = file.read_bytes()

    @fuzzing
    @given(mutated(json.loads(good)))
    def one(index: Any) -> None:
        file.write_text(json.dumps(index), "utf-8")
        try:
            open_checkpoint(sharded)
        except MosectlError as e:
            assert e.exit_code > 1

    try:
        one()
    finally:
        file.write_bytes(good)
