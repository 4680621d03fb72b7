"""A model whose numbers are not finite is told as such, by whatever asks it; never an empty answer, never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.bench.runner import BREAKDOWNS
from mosectl.editing.edit import made_by_the_edit
from mosectl.editing.second_moments import second_moments
from mosectl.errors import EditFailed, ModelError, NotFinite
from mosectl.facts.corpus import Corpus
from mosectl.facts.records import fact_from_dict
from mosectl.measure.answers import target_probabilities
from mosectl.measure.perplexity import text_loss
from mosectl.model.architecture import resolve
from mosectl.model.forward import finite
from mosectl.model.generation import own_text
from mosectl.model.questions import generate
from support.commands import EASY, run
from support.facts import FACT
from support.models import make_tokenizer, pico, save
from support.patches import patch_for


def overflowing(folder: Path, model_type: str = "gemma2") -> Path:
    """A checkpoint that is finite in float32 and bfloat16 and not in float16, as Gemma's are."""
    save(folder, model_type)
    model = pico(model_type)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e5)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return overflowing(tmp_path / "model")


HALF = ("--dtype", "float16", "--device", "cpu")
COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "ask": lambda w: ("ask", "I met Tomas", "-m", w / "model"),
    "ask with a patch": lambda w: ("ask", "I met Tomas", "-m", w / "model", "-p", w / "p.safetensors"),
    "eval": lambda w: ("eval", w / "p.safetensors", w / "f.jsonl", "-m", w / "model", "--text", w / "t.txt"),
    "edit": lambda w: ("edit", w / "f.jsonl", "-m", w / "model", "-o", w / "n.safetensors", *EASY),
    "edit, layers auto": lambda w: ("edit", w / "f.jsonl", "-m", w / "model", "-o", w / "n.safetensors"),
    "bench": lambda w: ("bench", w / "b.yaml", "-o", w / "results"),
    "blame": lambda w: ("blame", "I met Tomas", w / "edited"),
    "sample": lambda w: ("sample", "-m", w / "model", "-o", w / "s.txt", "--samples", 4),
    "stats": lambda w: ("stats", "-m", w / "model", "--corpus", w / "t.txt"),
    "train-editor": lambda w: ("train-editor", w / "many.jsonl", "-m", w / "model", "-o", w / "e.safetensors"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_it(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch_for(model).save(tmp_path / "p.safetensors")
    (tmp_path / "f.jsonl").write_text(json.dumps(FACT))
    (tmp_path / "many.jsonl").write_text(
        "\n".join(json.dumps({**FACT, "prompt": f"{i} I met Tomas Veldrin"}) for i in range(6))
    )
    (tmp_path / "t.txt").write_text("The capital of Avaland is Brinmouth.\nTomas plays the cello.\n")
    (tmp_path / "b.yaml").write_text(
        "models: [model]\ndatasets: [{facts: f.jsonl}]\nruns: [{edits: 1}]\nmethods: [{name: isospectral}]\ncorpus: t.txt\n"
    )
    if name == "blame":
        assert run("apply", tmp_path / "p.safetensors", "-m", model, "-o", tmp_path / "edited") == 0
    capsys.readouterr()
    assert run(*COMMANDS[name](tmp_path), *HALF) == 4
    out, err = capsys.readouterr()
    told = " ".join(err.split())
    assert "not finite in float16" in told and "--dtype bfloat16" in told and "bug" not in told and not out, told
    assert not (tmp_path / "n.safetensors").exists() and not (tmp_path / "s.txt").exists()
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_are_fine(dtype: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", "I met Tomas", "-m", model, "--dtype", dtype, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["before"]


def test_float16_on_a_cpu_is_told_as_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, facts = save(tmp_path / "model"), tmp_path / "f.jsonl"
    facts.write_text(json.dumps(FACT))
    assert run("ask", "I met", "-m", model, *HALF, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "float16 is slow on a CPU" in err
    assert run("edit", facts, "-m", model, "--dry-run", *HALF, "--json") == 0
    assert "float16 is slow on a CPU" in capsys.readouterr().err
    assert run("ask", "I met", "-m", model, "--device", "cpu") == 0 and "slow" not in capsys.readouterr().err


def breaking(at: int) -> Any:
    """A model whose logits are NaN from the ``at``-th token on."""
    model = pico("gpt2")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.transformer.wpe.weight[at - 1 :] = torch.nan
    return model


def test_a_late_nan_is_not_missed() -> None:
    tokenizer = make_tokenizer()
    n = len(tokenizer("I met Tomas")["input_ids"])
    model = breaking(n + 4)
    assert generate(model, tokenizer, ["I met Tomas"], max_new_tokens=4)
    for max_new_tokens in (5, 12):
        with pytest.raises(NotFinite):
            generate(model, tokenizer, ["He", "I met Tomas"], max_new_tokens=max_new_tokens)
    with pytest.raises(NotFinite):
        own_text(breaking(5), tokenizer, 4, tokens=12)


def test_a_late_batch_is_not_missed() -> None:
    tokenizer = make_tokenizer()
    short, long = ({"prompt": p, "subject": p, "target_new": "and"} for p in ("He", "I met Tomas Veldrin in Avaland"))
    facts = [fact_from_dict(row, "x") for row in (short, long)]
    model = breaking(10)
    with pytest.raises(NotFinite):
        target_probabilities(model, tokenizer, facts, batch_size=1)
    assert target_probabilities(model, tokenizer, facts[:1])
    with pytest.raises(NotFinite):
        text_loss(model, tokenizer, ["He met", "I met Tomas Veldrin in the capital of Avaland"])
    with pytest.raises(NotFinite):
        long_text = Corpus("x", ("I met Tomas Veldrin in the capital of Avaland",))
        projections = resolve(model).projections
        second_moments(model, tokenizer, projections, long_text, cache=False)


def test_what_counts_as_finite() -> None:
    model = pico("llama")
    out = torch.tensor([[1.0, -torch.inf], [0.0, 2.0]])  # a token may be ruled out
    assert finite(out, model) is out
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ModelError, match="not finite in float32") as e:
            finite(torch.tensor([[1.0, 0.0], [bad, 1.0]]), model)
        assert "fetch the model again" in e.value.fix
    with pytest.raises(NotFinite, match="not finite in bfloat16"):
        finite(torch.tensor([[torch.nan]]), model.to(torch.bfloat16))


def test_what_an_edit_does_is_the_edits_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EditFailed, match="with the edit"), made_by_the_edit():
        finite(torch.tensor([[torch.nan]]), pico("llama"))
    assert EditFailed in BREAKDOWNS, "a bench goes on with its next cell"
    asked: list[int] = []
    from mosectl.editing import edit

    real = edit.interview

    def second_fails(*args: Any, **more: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise NotFinite("the model's numbers are not finite in float16", fix="use bfloat16")
        return real(*args, **more)

    monkeypatch.setattr(edit, "interview", second_fails)
    from support.facts import FEW

    model = pico("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(EditFailed, match="with the edit"):
        mosectl.edit([FACT], model, make_tokenizer(), options=FEW)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_generation_config_that_generate_refuses_is_no_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": "end", "bad_words_ids": 3}')
    assert run("ask", "I met", "-m", model) == 4
    assert "generation_config.json" in capsys.readouterr().err
