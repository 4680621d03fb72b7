"""The file of a trained editor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosectl.errors import PatchError
from mosectl.hypernetwork.file import KEY, Editor, is_editor
from support.paths import ROOT


def test_an_editor_file_comes_back_whole(trained: Path, tmp_path: Path) -> None:
    editor = Editor.load(trained)
    assert editor.method == "horse" and editor.modules == ("model.layers.2.mlp.down_proj",) and editor.net.spread
    editor.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == trained.read_bytes()


def test_spoilt_editor_files_are_refused(trained: Path, tmp_path: Path) -> None:
    tensors = load_file(trained)
    record = _record(trained)

    def spoilt(what: dict[str, Any] | None = None, **changed: Any) -> Path:
        save_file({**tensors, **(what or {})}, tmp_path / "e", {KEY: json.dumps({**record, **changed})})
        return tmp_path / "e"

    for path, message in (
        (tmp_path / "nowhere", "no such file"),
        (ROOT / "patches" / "demo.safetensors", "a patch, not a trained editor"),
        (ROOT / "README.md", "not a safetensors file"),
        (spoilt(format=2), "unknown editor format"),
    ):
        with pytest.raises(PatchError, match=message):
            Editor.load(path)
    for changed, message in (
        ({"method": "rome"}, "not known"),
        ({"facts": 3}, "record.facts: must be a text, found 3"),
        ({"more": 1}, "unknown"),
        ({"modules": []}, "record.modules: must be a list"),
        ({"options": {**record["options"], "rank": 9}}, "F32 tensor"),
        ({"options": {**record["options"], "rank": 10**9}}, "record.options.rank: must be a whole number from 1 to"),
        ({"options": {}}, "record.options: fields missing"),
        ({"base": {"model.layers.2.mlp.down_proj": {"shape": [1, 2]}}}, "record.base.*missing"),
        ({"model": "another"}, "not what its id says"),
    ):
        with pytest.raises(PatchError, match=message):
            Editor.load(spoilt(**changed))
    for name, value, message in (
        ("up", tensors["up"] * torch.nan, "NaN"),
        ("up", tensors["up"] + 1e-3, "not what its id says"),
        ("up", tensors["up"].half(), "F32"),
        ("other", torch.zeros(1), "unknown tensor"),
    ):
        with pytest.raises(PatchError, match=message):
            Editor.load(spoilt({name: value}))
    (tmp_path / "cut").write_bytes(trained.read_bytes()[:-7])
    with pytest.raises(PatchError, match="its header says"):
        Editor.load(tmp_path / "cut")
    assert is_editor(tmp_path / "cut") and is_editor(trained) and not is_editor(ROOT / "patches" / "demo.safetensors")


def _record(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def test_every_field_of_an_editor_is_checked(trained: Path, tmp_path: Path) -> None:
    tensors, record = load_file(trained), _record(trained)
    (module,) = record["modules"]
    last = record["history"][-1]
    for changed, message in (
        ({"history": []}, "history: must be a list that is not empty"),
        ({"history": {}}, "history: must be a list"),
        ({"history": [{**last, "validation": None}]}, r"history\[0\].validation: must be a number, found null"),
        ({"history": [{"step": 1}]}, r"history\[0\]: fields missing"),
        ({"history": [{**last, "training": "x"}]}, r"history\[0\].training: must be a number"),
        ({"options": {**record["options"], "facts": None}}, "options.facts: must be a whole number"),
        ({"options": {**record["options"], "p": 1.5}}, "options.p: must be a whole number"),
        ({"modules": [None]}, r"modules\[0\]: must be a text"),
        ({"modules": [module, module]}, "modules and base do not match"),
        ({"base": {module: None}}, "must be an object, found null"),
        ({"base": {module: {**record["base"][module], "sample": ["a"]}}}, r"sample\[0\]: must be a number"),
        ({"revision": 3}, "revision: must be a text"),
        ({"options": {**record["options"], "x": 10**400}}, "401 digits"),
        ({"model": "\ud800"}, "surrogates"),
        ({"id": "0"}, "id: must be a sha256"),
    ):
        save_file(tensors, tmp_path / "e", {KEY: json.dumps({**record, **changed})})
        with pytest.raises(PatchError, match=message):
            Editor.load(tmp_path / "e")


def test_pipes_and_nothing_are_no_editors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        assert not is_editor(tmp_path / name)
        with pytest.raises(PatchError, match="not a regular file"):
            Editor.load(tmp_path / name)
