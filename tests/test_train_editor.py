"""Training of HORSE's and MALMEN's network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.errors import EditFailed, FactsError, ModelError, MosectlError, OutputError, UsageError
from mosectl.facts.corpus import Corpus, read_corpus
from mosectl.facts.records import fact_from_dict, read_facts
from mosectl.hypernetwork import train as train_editor
from mosectl.hypernetwork.beforehand import TrainOptions, edited_projections, with_validation
from mosectl.hypernetwork.file import Editor
from mosectl.hypernetwork.network import nll, shifted
from mosectl.hypernetwork.train import MATRICES, SCALARS, _Training, train
from mosectl.model.architecture import resolve
from mosectl.model.loading import Loaded, load
from mosectl.model.scoring import Rows
from support.commands import TWO_PROCESSES, run
from support.editors import FEW, TEXT, facts, loaded, rows
from support.editors import asked as rows_asked
from support.models import make_tokenizer, pico, save
from support.paths import DEMO, ROOT


def begun(**how: Any) -> _Training:
    """A training of two layers that has its units."""
    run = _Training(
        loaded(), list(resolve(pico("llama")).projections)[:2], facts(6), facts(6), replace(FEW, **how), TEXT
    )
    run.begin()
    return run


@pytest.mark.parametrize("way", ["horse", "malmen"])
def test_gradients_of_a_training_step_against_finite_differences(way: str) -> None:
    """Through the model, ΔW and the network, although the two are never in one graph."""
    given = Loaded(pico("gpt2").double(), make_tokenizer(), None)
    options = replace(FEW, method=way, layers="0-2")
    run = _Training(given, list(resolve(given.model).projections), facts(6), facts(6), options, TEXT)
    run.net.double()
    run.begin()
    with torch.no_grad():
        for x in run.net.parameters():
            x.add_(0.05 * torch.randn_like(x))
    run.net.zero_grad()
    run.step = ""  # type: ignore[assignment]  # the same locality prompts as without learning
    run.edited(facts(3), learn=True)
    for name, i in (("rate", 0), ("ridge", 2), ("bias", 5), ("up", 3), ("shift", 40)):
        x = dict(run.net.named_parameters())[name]
        flat, step = x.data.view(-1), 1e-4
        values = []
        for sign in (1, -1):
            flat[i] += sign * step
            values.append(run.edited(facts(3), learn=False).total)
            flat[i] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(x.grad.view(-1)[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-7), name


def test_every_part_of_the_network_learns_from_the_first_step_on() -> None:
    """Blocks begin at 0, where a relu's gradient would be 0 for good."""
    run = begun()
    run.edited(facts(3), learn=True)
    for name in ("up", "bias", "shift", "rate", "ridge"):
        assert float(dict(run.net.named_parameters())[name].grad.abs().max()) > 0, name
    before = {k: v.clone() for k, v in run.net.named_parameters()}
    for _ in range(2):
        run.advance()
    assert all(not torch.equal(v, before[k]) for k, v in run.net.named_parameters()), "down and scale from the second"


def test_how_far_a_step_goes() -> None:
    def after(steps: int, **how: Any) -> _Training:
        run = begun(**how)
        for _ in range(steps):
            run.advance()
        return run

    run, began = after(1), after(0)
    rates = {"shift": 1, "up": MATRICES, "bias": MATRICES, "rate": SCALARS, "ridge": SCALARS}
    for name, share in rates.items():  # Adam's first step is its rate, wherever there is a gradient
        moved = (dict(run.net.named_parameters())[name] - dict(began.net.named_parameters())[name]).abs().max()
        assert float(moved.detach()) == pytest.approx(share * FEW.rate, rel=1e-2), name
    assert not torch.equal(after(3).net.up, after(3, clip=1e-6).net.up), "gradients are clipped"


def test_the_weight_of_locality_counts_and_is_not_told() -> None:
    found, grads = [], []
    for weight in (0.0, 1.0, 5.0):
        run = begun(locality=weight)
        run.net.zero_grad()
        found.append(run.edited(facts(3), learn=True))
        grads.append(run.net.rate.grad.clone())
    assert found[0].locality == 0 and found[1].locality == pytest.approx(found[2].locality, rel=1e-4)
    assert found[2].total == pytest.approx(found[1].total + 4 * found[1].locality, rel=1e-4)
    assert torch.allclose(grads[2] - grads[0], 5 * (grads[1] - grads[0]), rtol=1e-2, atol=1e-5)


def test_what_a_training_step_asks_of_the_edited_model() -> None:
    run = begun()
    some = facts(3)
    found = run.edited(some, learn=False)

    def asked(pairs: list[tuple[str, str]]) -> Rows:
        return rows_asked(run.model, run.loaded.tokenizer, pairs)

    own = asked([(f.prompt, f.target_new) for f in some])
    with torch.no_grad():
        K, G = run._keys(own)
        shifts = run.net.shifts(K, run.net(K, G))
        with shifted(run.model, run.projections, shifts):
            edit = nll(run.model, own).mean()
            other = nll(run.model, asked([(f.rephrase_prompts[0], f.target_new) for f in some])).mean()
    assert found.edit == pytest.approx(float(edit), rel=1e-4)
    assert found.generalization == pytest.approx(float(other), rel=1e-4) and abs(float(edit - other)) > 1e-3
    chance = train_editor.random.Random(0)
    pairs = run._elsewhere(some, chance)
    assert [p for p, _ in pairs[:3]] == ["A cello plays in the"] * 3 and len(pairs) == 4, (
        "one text for every fourth fact"
    )
    assert any(pairs[3][0] in text and pairs[3][1] in text for text in TEXT.texts)


def test_batches_and_what_is_held_out() -> None:
    known, unseen = with_validation(facts(20), (), FEW)
    assert (len(known), len(unseen)) == (18, 2) and {f.prompt for f in (*known, *unseen)} == {
        f.prompt for f in facts(20)
    }
    assert with_validation(known, unseen, FEW) == (known, unseen)
    run = _Training(loaded(), list(resolve(pico("llama")).projections)[:1], known, unseen, FEW, TEXT)
    rounds = [[f.prompt for n in range(6 * r, 6 * r + 6) for f in run._batch(n)] for r in range(2)]
    assert all(len(set(r)) == 18 for r in rounds) and rounds[0] != rounds[1]


def test_a_state_keeps_the_best_network_beside_the_last(tmp_path: Path) -> None:
    run = begun()
    run.advance()
    run.save(tmp_path / "state")
    again = begun()
    again.best = {k: v + 1 for k, v in again.best.items()}
    again.load(tmp_path / "state")
    assert all(torch.equal(v, run.best[k]) for k, v in again.best.items())
    assert all(torch.equal(v, run.net.state_dict()[k]) for k, v in again.net.state_dict().items())
    assert not torch.equal(again.best["up"], again.net.up)


def test_training_is_deterministic_and_leaves_the_model_alone(tmp_path: Path) -> None:
    given = loaded()
    before = {k: v.clone() for k, v in given.model.state_dict().items()}
    seen: list[int] = []
    first = train(given, facts(), FEW, TEXT, on_step=lambda done, _: seen.append(done))
    assert all(torch.equal(v, before[k]) for k, v in given.model.state_dict().items())
    assert first.id == train(loaded(), facts(), FEW, TEXT).id
    assert first.id != train(loaded(), facts(), replace(FEW, seed=1), TEXT).id
    assert seen == [1, 2, 3, 4, 5, 6] and [h["step"] for h in first.history] == [0, 2, 4, 6]


def test_training_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole, state = train(loaded(), facts(), FEW, TEXT), tmp_path / "e.progress"

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(loaded(), facts(), FEW, TEXT, state=state, on_step=stop)
    steps: list[int] = []
    again = train(loaded(), facts(), FEW, TEXT, state=state, resume=True, on_step=lambda done, _: steps.append(done))
    assert steps == [5, 6], "from the validation after step 4 on"
    assert again.id == whole.id
    with pytest.raises(OutputError, match="other facts"):
        train(loaded(), facts(8), FEW, TEXT, state=state, resume=True)
    with pytest.raises(OutputError, match="other corpus"):
        train(loaded(), facts(), FEW, replace(TEXT, texts=TEXT.texts[1:]), state=state, resume=True)
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(OutputError, match="damaged"):
        train(loaded(), facts(), FEW, TEXT, state=state, resume=True)


def test_training_stops_early_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = iter(range(1, 100))
    real = train_editor._Training.edited

    def edited(self: Any, chosen: Any, learn: bool) -> Any:
        found = real(self, chosen, learn)
        return found if learn else replace(found, edit=float(next(worse)))

    monkeypatch.setattr(train_editor._Training, "edited", edited)
    editor = train(loaded(), facts(), replace(FEW, steps=100, patience=3), TEXT)
    assert [h["step"] for h in editor.history] == [0, 2, 4, 6]
    fresh = _Training(loaded(), list(resolve(pico("llama")).projections)[-1:], facts(), facts(), FEW, TEXT)
    assert torch.equal(editor.net.up, fresh.net.up), "the network as it began was the best"


def test_training_lowers_the_loss_on_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_world import build_world, counterfacts

    world = build_world()
    rows = counterfacts(world, world.facts[::5], around=world.facts[1::5])
    known = [fact_from_dict(row, "x") for row in rows]
    options = TrainOptions(steps=24, every=24, batch_size=16)
    given, unseen = load(DEMO, device="cpu"), known[:16]
    first, last = train(given, known[16:], options, read_corpus(None), validation=unseen).history
    assert last["validation"] < 0.8 * first["validation"] and last["edit"] < first["edit"]


def test_what_cannot_be_trained() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        train(loaded(), facts(), replace(FEW, method="memit"), TEXT)
    with pytest.raises(FactsError, match="too few facts"):
        train(loaded(), facts(2), FEW, TEXT)
    with pytest.raises(FactsError, match="trained on as well"):
        train(loaded(), facts(5), FEW, TEXT, validation=facts(6)[4:])
    with pytest.raises(UsageError, match="nothing would be learnt"):
        train(loaded(), facts(), replace(FEW, rate=0.0), TEXT)
    with pytest.raises(EditFailed, match="validation loss is not finite"):
        train(loaded(), facts(), replace(FEW, rate=1e9, every=1), TEXT)
    with pytest.raises(MosectlError, match="mixtures"):
        train(loaded("mixtral"), facts(), FEW, TEXT)
    with pytest.raises(UsageError, match="what shall stay"):
        bare = [replace(f, locality=()) for f in facts()]
        train(loaded(), bare, FEW, Corpus("x", ("too short",)))
    given = loaded()
    with torch.no_grad():
        given.model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite in float32"):  # the model itself, before any step
        train(given, facts(), FEW, TEXT)


def test_train_editor_and_edit_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "m")
    (tmp_path / "facts.jsonl").write_text(rows(9))
    out = tmp_path / "e.safetensors"
    small = ("--rank", 4, "--steps", 4, "--every", 2, "--batch-size", 3)
    asked = ("train-editor", tmp_path / "facts.jsonl", "--model", model, "-o", out, *small)
    assert run(*asked, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == Editor.load(out).id and [h["step"] for h in told["history"]] == [0, 2, 4]
    assert not (tmp_path / "e.safetensors.progress").exists()
    assert run(*asked) == 7 and "exists" in capsys.readouterr().err
    assert run(*asked, "--overwrite") == 0
    shown = capsys.readouterr()
    assert "horse on 1 layers" in shown.out and "kept: step" in shown.out and "--method horse --editor" in shown.err
    edit = ("edit", tmp_path / "facts.jsonl", "--model", model, "-o", tmp_path / "p.safetensors", "--set", "guard=0")
    assert run(*edit, "--method", "horse") == 2 and "mosectl train-editor" in capsys.readouterr().err
    assert run(*edit, "--method", "malmen", "--editor", out) == 2
    assert run(*edit, "--method", "horse", "--editor", tmp_path / "facts.jsonl") == 5
    capsys.readouterr()
    assert run(*edit, "--method", "horse", "--editor", out, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    other = save(tmp_path / "other", intermediate_size=40)
    assert run(*edit[:3], other, "--method", "horse", "--editor", out, "--dry-run") == 6
    assert "shape" in capsys.readouterr().err
    assert plan["layers"] == [2] and not plan["auto"] and "statistics" not in plan["seconds"]
    assert run(*asked[:-2], "--method", "rome", "--overwrite") == 2
    capsys.readouterr()
    assert run("inspect", out) == 0
    shown = capsys.readouterr().out
    assert "kept: step" in shown and "model.layers.2.mlp.down_proj" in shown and "corpus=embedded" in shown
    assert run("inspect", out, "--model", model) == 2 and "leave it out" in capsys.readouterr().err
    failed = tmp_path / "failed.safetensors"
    assert run(*asked[:4], "-o", failed, *small, "--rate", 1e9) == 8 and not list(tmp_path.glob("failed*"))
    capsys.readouterr()
    assert run("inspect", out, "--json") == 0 and json.loads(capsys.readouterr().out)["method"] == "horse"


def test_training_under_accelerate_launch(tmp_path: Path) -> None:
    """Two processes with a batch each learn what one learns from the mean of the two batches' gradients."""
    model, out = save(tmp_path / "m"), tmp_path / "e"
    (tmp_path / "facts.jsonl").write_text(rows(9))
    asked = ("train-editor", tmp_path / "facts.jsonl", "--model", model, "-o", out, "--json")
    small = ("--rank", "4", "--steps", "1", "--batch-size", "3", "--locality", "0")
    command = [sys.executable, "-m", *TWO_PROCESSES, "mosectl", *map(str, asked), *small]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["id"] == Editor.load(out).id, "told once"

    options = TrainOptions(rank=4, batch_size=3, steps=1, locality=0.0)
    given = load(model, device="cpu")
    known, unseen = with_validation(read_facts(tmp_path / "facts.jsonl").facts, (), options)
    trained = dict(Editor.load(out).net.named_parameters())
    agreed = []
    for batches in (range(2), range(1)):
        alone = _Training(given, edited_projections(given.model, options), known, unseen, options, read_corpus(None))
        alone.begin()
        alone.adam.zero_grad()
        for number in batches:
            alone.edited(alone._batch(number), learn=True)
        alone.adam.step()  # Adam's first step is the gradient's sign: its size, and clipping, do not matter
        same = [(x - trained[name]).abs() < 1e-4 for name, x in alone.net.named_parameters() if name != "down"]
        agreed.append(float(torch.cat([x.flatten() for x in same]).float().mean()))
    assert agreed[0] > 0.97 and agreed[1] < 0.9


def test_what_was_learnt_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, real = tmp_path / "e.progress", _Training.edited

    def edited(self: Any, chosen: Any, learn: bool) -> Any:
        found = real(self, chosen, learn)
        return replace(found, edit=float("nan")) if learn and self.step == 3 else found

    with monkeypatch.context() as m:
        m.setattr(_Training, "edited", edited)
        with pytest.raises(EditFailed, match="not finite") as failed:
            train(loaded(), facts(), FEW, TEXT, state=state)
    assert "--resume --steps 2" in str(failed.value.fix)
    saved = train(loaded(), facts(), replace(FEW, steps=2), TEXT, state=state, resume=True)
    assert saved.id == train(loaded(), facts(), replace(FEW, steps=2), TEXT).id


def test_losses_as_a_picture(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    from mosectl.render.charts import png_training

    assert png_training(Editor.load(trained).history).startswith(b"\x89PNG")


def test_an_interrupted_training_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = save(tmp_path / "m")
    (tmp_path / "facts.jsonl").write_text(rows(9))
    out, state = tmp_path / "e.safetensors", tmp_path / "e.safetensors.progress"
    asked = ("train-editor", tmp_path / "facts.jsonl", "--model", model, "--rank", 4, "--steps", 4, "--every", 2)
    assert run(*asked, "--batch-size", 3, "-o", tmp_path / "whole") == 0
    real = _Training.advance

    def advance(self: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as m:
        m.setattr(_Training, "advance", advance)
        assert run(*asked, "--batch-size", 3, "-o", out) == 130
    told = capsys.readouterr().err
    assert f"interrupted: {state} holds the training up to its last validation\n  → give --resume to go on\n" in told
    assert "nothing half-written" not in told and state.exists() and not out.exists()
    assert run(*asked, "--batch-size", 3, "-o", out) == 7 and "interrupted training" in capsys.readouterr().err
    assert run(*asked, "--batch-size", 3, "-o", out, "--resume") == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not state.exists()
    assert f"goes on with {state}" in capsys.readouterr().err
