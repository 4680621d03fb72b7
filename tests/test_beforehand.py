"""What can be refused before a model's weights are loaded is: for a large one that saves minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from mosectl.cli import train as train_command
from mosectl.editing.resume import beside
from mosectl.editing.session import Session
from support.commands import EASY, World, run
from support.editors import rows
from support.facts import CORPUS, FACTS
from support.hub_server import TOKEN, call, serving
from support.models import save
from support.patches import patch_for

LONG = "I met Tomas Veldrin " * 100  # more than the model reads


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    (tmp_path / "corpus.txt").write_text(CORPUS)
    patch_for(world.model, seed=1).save(tmp_path / "q.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    (tmp_path / "many.jsonl").write_text(rows(9))
    return world


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


REFUSED: dict[str, tuple[Callable[[World], tuple[object, ...]], int, str]] = {
    "edit: layers": (lambda w: w.edit("--layers", "99"), 2, "--layers 99"),
    "edit: layers that are none": (lambda w: w.edit("--layers", "top"), 2, "--layers top"),
    "edit: dtype": (lambda w: w.edit("--dtype", "int8"), 2, "--dtype int8"),
    "edit: device": (lambda w: w.edit("--device", "nonsense"), 2, "--device nonsense"),
    "edit: number of a device": (lambda w: w.edit("--device", "cuda:x"), 2, "--device cuda:x"),
    "edit: corpus": (lambda w: w.edit("--corpus", w.folder / "none.txt"), 2, "none.txt"),
    "edit: form": (lambda w: w.edit("--form", "flat"), 2, "--form flat"),
    "edit: method": (lambda w: w.edit("--method", "magic"), 2, "magic"),
    "edit: setting": (lambda w: w.edit("--set", "magic=1"), 2, "magic=1"),
    "edit: editor": (lambda w: (*w.edit()[:6], "--method", "horse", "--editor", w.folder / "none"), 5, "none"),
    "edit: output": (lambda w: (*w.edit()[:4], "-o", w.patch), 7, "exists"),
    "edit: a prompt too long": (
        lambda w: (
            *w.with_facts(json.dumps({**FACTS[0], "rephrase_prompts": [LONG]}).encode()),
            *("--model", save(w.folder / "gpt", "gpt2")),
        ), 3, "the rephrasing",
    ),
    "ask: device": (lambda w: ("ask", "x", "-m", w.model, "-p", w.patch, "--device", "tpu"), 2, "--device tpu"),
    "ask: dtype": (lambda w: ("ask", "x", "-m", w.model, "--dtype", "int8"), 2, "--dtype int8"),
    "apply: output": (
        lambda w: ("apply", w.patch, w.folder / "q.safetensors", "-m", w.model, "-o", w.folder / "there", "--check-facts",
                   "--allow-conflicts"), 7, "exists",
    ),
    "apply: device": (
        lambda w: ("apply", w.patch, "-m", w.model, "-o", w.folder / "out", "--check-facts", "--device", "tpu"),
        2, "--device tpu",
    ),
    "eval: text": (
        lambda w: ("eval", w.patch, w.facts, "-m", w.model, "--text", w.folder / "none.txt"), 2, "none.txt",
    ),
    "eval: dtype": (lambda w: ("eval", w.patch, w.facts, "-m", w.model, "--dtype", "int8"), 2, "--dtype int8"),
    "eval: protocol": (lambda w: ("eval", w.patch, w.facts, "-m", w.model, "--protocol", "x"), 2, "protocol"),
    "stats: layers": (lambda w: ("stats", "-m", w.model, "--layers", "3"), 2, "--layers 3"),
    "stats: corpus": (lambda w: ("stats", "-m", w.model, "--corpus", w.folder / "none.txt"), 2, "none.txt"),
    "sample: dtype": (lambda w: ("sample", "-m", w.model, "-o", w.folder / "s.txt", "--dtype", "int8"), 2, "int8"),
    "train-editor: layers": (
        lambda w: ("train-editor", w.folder / "many.jsonl", "-m", w.model, "-o", w.folder / "e.safetensors",
                   "--layers", "99"), 2, "--layers 99",
    ),
    "train-editor: device": (
        lambda w: ("train-editor", w.folder / "many.jsonl", "-m", w.model, "-o", w.folder / "e.safetensors",
                   "--device", "tpu"), 2, "--device tpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_before_the_weights(case: str, world: World, no_weights: None, capsys: pytest.CaptureFixture[str]) -> None:
    command, code, told = REFUSED[case]
    assert run(*command(world)) == code
    err = capsys.readouterr().err
    assert told in err and "\n  →" in err and "the weights were loaded" not in err


def test_an_interrupted_run_of_other_settings(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.facts.write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    how = ("--batch-size", "1", "--corpus", world.folder / "corpus.txt")
    real = Session._batch

    def second(session: Session, *args: object) -> object:
        if session.curve[1:]:
            raise KeyboardInterrupt
        return real(session, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Session, "_batch", second)
        assert run(*world.edit(*how)) == 130
    state = beside(world.folder / "new.safetensors")
    before = state.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        assert run(*world.edit(*how, "--resume", "--set", "preserve=3")) == 7
        assert "other settings" in capsys.readouterr().err
        assert run(*world.edit(*how, "--resume", "--layers", "0-1")) == 7
        assert "other settings and layers" in capsys.readouterr().err
        assert run(*world.edit(*how, "--resume", "--limit", "1")) == 7
        assert "other facts" in capsys.readouterr().err
        state.write_bytes(before[:100])
        assert run(*world.edit(*how, "--resume")) == 7
        assert "is damaged" in capsys.readouterr().err
    state.write_bytes(before)
    assert run(*world.edit(*how, "--resume")) in (0, 8), "with its own settings it goes on"
    assert not state.exists()


def test_an_interrupted_training_of_other_settings(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*more: object) -> int:
        how = (
            "--rank",
            "4",
            "--batch-size",
            "3",
            "--steps",
            "1",
            "--every",
            "1",
            "--corpus",
            world.folder / "corpus.txt",
        )
        facts, out = world.folder / "many.jsonl", world.folder / "e.safetensors"
        return run("train-editor", facts, "-m", world.model, "-o", out, *how, *more)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train_command, "_write", stopped)
        assert train() == 130
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        for more, what in ((("--rank", "5"), "options"), (("--limit", "8"), "facts"), (("--seed", "1"), "options")):
            assert train(*more, "--resume") == 7
            assert f"other {what}" in capsys.readouterr().err or what == "options"
    assert train("--resume") == 0


def test_nothing_large_is_fetched_for_what_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path / "w")
    with serving() as (hub, address):
        hub.repos["me/model"] = {}
        hub.commit("me/model", {p.name: p.read_bytes() for p in world.model.iterdir()})
        edit = ("edit", world.facts, "--model", "me/model", "-o", tmp_path / "p.safetensors", *EASY)
        done = call(address, tmp_path, *edit, "--layers", "99", token=TOKEN)
        assert done.returncode == 2 and "--layers 99" in done.stderr
        assert not any("model.safetensors" in path for _, path, _ in hub.asked)
