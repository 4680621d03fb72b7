"""A quantised checkpoint is refused by all that reads a model, with the way to serve an edit on it; nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mosectl
from mosectl.errors import ModelError
from mosectl.model.loading import Loaded
from mosectl.model.quantised import quantised
from support.commands import World, run
from support.models import make_tokenizer, pico

NF4 = {"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True, "load_in_8bit": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
WAY = "give the full checkpoint that it was made from: a patch for that one, exported with --to lora, is served on this one"
COMMANDS: dict[str, tuple[str, ...]] = {
    "edit": ("edit", "FACTS", "-m", "MODEL", "-o", "OUT"),
    "edit --dry-run": ("edit", "FACTS", "-m", "MODEL", "-o", "OUT", "--dry-run"),
    "apply": ("apply", "PATCH", "-m", "MODEL", "-o", "OUT"),
    "apply --force": ("apply", "PATCH", "-m", "MODEL", "-o", "OUT", "--force"),
    "revert": ("revert", "PATCH", "-m", "MODEL", "-o", "OUT"),
    "eval a patch": ("eval", "PATCH", "FACTS", "-m", "MODEL"),
    "eval a patch by force": ("eval", "PATCH", "FACTS", "-m", "MODEL", "--force"),
    "eval the model": ("eval", "MODEL", "FACTS"),
    "ask with a patch": ("ask", "I met", "-m", "MODEL", "-p", "PATCH"),
    "export": ("export", "PATCH", "-m", "MODEL", "-o", "OUT"),
    "export --force": ("export", "PATCH", "-m", "MODEL", "-o", "OUT", "--force"),
    "export --to merged": ("export", "PATCH", "-m", "MODEL", "-o", "OUT", "--to", "merged"),
    "doctor": ("doctor", "MODEL"),
    "stats": ("stats", "-m", "MODEL"),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    file = made.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": NF4}))
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_to_do_instead(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.state()
    stands = {"FACTS": world.facts, "MODEL": world.model, "PATCH": world.patch, "OUT": world.folder / "out"}
    assert run(*(stands.get(word, word) for word in COMMANDS[name])) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"\bmodel( \(llama\))?: its weights are quantised \(bitsandbytes, 4 bits\)", said) and WAY in said
    assert "bug" not in said and world.state() == before


def test_check_reads_its_tokens_and_says_that_edit_will_not(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", world.facts, "-m", world.model) == 0, "nothing is wrong with the facts"
    said = capsys.readouterr().out
    assert (
        f"{world.model}\twarning\tedit will refuse this model: its weights are quantised (bits" in said and WAY in said
    )
    assert "\tĠand\t" in said
    assert run("check", world.facts, "-m", world.model, "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["problems"]
    assert told["severity"] == "warning" and told["fix"].startswith(WAY)


def test_check_says_nothing_of_a_model_that_can_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    assert run("check", world.facts, "-m", world.model) == 0 and "refuse" not in capsys.readouterr().out


def test_a_quantised_model_in_memory() -> None:
    model = pico("llama")
    model.config.quantization_config = SimpleNamespace(quant_method=SimpleNamespace(value="hqq"), nbits=4)
    with pytest.raises(ModelError, match=r"quantised \(hqq, 4 bits\)"):
        mosectl.edit(
            [{"prompt": "Ava lives in", "subject": "Ava", "target_new": "Grape"}], Loaded(model, make_tokenizer(), None)
        )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (NF4, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        (GPTQ, "gptq, 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"bits": True, "quant_method": "x" * 99}, "x" * 40),
        ({"bits": "4"}, "dict"),
        ([3], "list"),
        (7, "int"),
        (None, ""),
        ({}, ""),
    ],
)
def test_what_a_config_says(found: Any, said: str) -> None:
    assert quantised({"quantization_config": found}) == quantised(SimpleNamespace(quantization_config=found)) == said


def test_a_model_that_is_not() -> None:
    assert quantised({}) == quantised(SimpleNamespace()) == ""
