"""Files of a model folder that transformers reads: looked at before it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mosectl.editing.diagnosis import diagnose
from mosectl.errors import ModelError
from mosectl.model.files import OBJECTS, check_model_files
from mosectl.model.readiness import load_tokenizer
from support.commands import run
from support.models import save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy to spoil; weights are linked."""
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        to = tmp_path / "model" / file.name
        os.link(file, to) if file.suffix == ".safetensors" else to.write_bytes(file.read_bytes())
    return tmp_path / "model"


def sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(20 * 10**9)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "brackets": (lambda f: f.write_text("[" * 100_000), "nested deeper"),
    "objects": (lambda f: f.write_text('{"a":' * 100_000), "nested deeper"),
    "null": (lambda f: f.write_text("null"), "not a JSON object"),
    "a large number": (lambda f: f.write_text('{"a": ' + "9" * 5000 + "}"), "5000 digits"),
    "not UTF-8": (lambda f: f.write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
    "cut": (lambda f: f.write_text('{"a": '), "damaged"),
    "pipe": (os.mkfifo, "not a regular file"),
    "device": (lambda f: f.symlink_to("/dev/zero"), "not a regular file"),
    "sparse": (sparse, "20,000,000,000 bytes"),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("kind", WRONG)
def test_refused_before_transformers_sees_it(kind: str, name: str, folder: Path) -> None:
    make, what = WRONG[kind]
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ModelError, match=what) as told:
        check_model_files(folder)
    assert str(folder / name) in str(told.value) and told.value.fix


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_on_the_command_line(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text("[" * 100_000)
    (tmp_path / "facts.jsonl").write_text('{"prompt": "Ava is", "subject": "Ava", "target_new": "x"}\n')
    for command in (
        ("ask", "Hi", "--model", folder),
        ("doctor", folder),
        ("check", tmp_path / "facts.jsonl", "--model", folder),
    ):
        assert run(*command) == 4, command
        assert name in capsys.readouterr().err


def test_others(folder: Path) -> None:
    check_model_files(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": int(1e30)})
    )
    (folder / "README.txt").symlink_to(folder / "gone")
    (folder / "results.json").write_text("[" * 100_000)  # read by nobody
    (folder / "pipe").touch()
    check_model_files(folder)
    os.mkfifo(folder / "tokenizer.model")
    with pytest.raises(ModelError, match="not a regular file"):
        check_model_files(folder)
    (folder / "tokenizer.model").unlink()
    sparse(folder / "chat_template.jinja")
    with pytest.raises(ModelError, match="20,000,000,000 bytes"):
        check_model_files(folder)


@pytest.mark.parametrize("content", ['{"model": 5}', "{}", '{"model": {"type": "BPE", "vocab": [], "merges": 7}}'])
def test_json_that_is_no_tokenizer(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)
    assert any("tokenizer cannot be loaded" in p for p in diagnose(folder).problems)
