"""HORSE and MALMEN: the closed form, its gradients, the training, the editor file, and edits with it."""

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
from conftest import DEMO, ROOT, make_tokenizer, pico, save
from safetensors.torch import load_file, save_file
from test_cli import TWO_PROCESSES, run
from test_editor import CORPUS, FACTS
from torch import Tensor

import mosectl
from mosectl import train_editor
from mosectl.arch import resolve
from mosectl.editor_file import KEY, Editor
from mosectl.errors import (
    BaseMismatch,
    EditFailed,
    FactsError,
    MosectlError,
    Notice,
    OutputError,
    PatchError,
    UsageError,
)
from mosectl.facts import Fact, Probe, fact_from_dict, read_facts
from mosectl.hypernet import START, Hypernet, Rows, keys_and_gradients, nll, orthogonal, ridge, shifted
from mosectl.live import Loaded, load
from mosectl.options import default_options, options_from
from mosectl.patch import Patch
from mosectl.solvers import method
from mosectl.stats import Corpus, read_corpus
from mosectl.targets import build_contexts
from mosectl.train_editor import MATRICES, SCALARS, TrainOptions, _Training, train

TEXT = Corpus(
    "x", tuple(f"{CORPUS} number {i} of the towns lies near the sea and was born in the capital" for i in range(4))
)
FEW = TrainOptions(rank=8, batch_size=3, steps=6, every=2, rate=1e-2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def facts(n: int = 9) -> list[Fact]:
    names = ["Brinmouth", "Lower Quill", "Tomas", "cello", "capital"]
    return [
        Fact(
            f"The capital of {names[i % 5]} {i} is", f"{names[i % 5]} {i}", names[(i + 1) % 5],
            rephrase_prompts=(f"{names[i % 5]} {i} was born in",), locality=(Probe("A cello plays in the", "capital"),),
        )
        for i in range(n)
    ]  # fmt: skip


def loaded(kind: str = "llama", **how: Any) -> Loaded:
    return Loaded(pico(kind, **how), make_tokenizer(), None)


def net(spread: bool = True, layers: int = 3, p: int = 7, d: int = 5) -> tuple[Hypernet, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    made = Hypernet(layers, p, d, rank=4, blocks=2, spread=spread).double()
    with torch.no_grad():
        for x in made.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return made, [random(6, p, seed=i) for i in range(layers)], [random(6, d, seed=10 + i) for i in range(layers)]


# The closed form.


@pytest.mark.parametrize("n", [3, 40])
def test_ridge_against_the_normal_equations(n: int) -> None:
    K, D, s = random(n, 12), random(n, 4, seed=1), torch.tensor(0.7, dtype=torch.float64)
    X = ridge(K, D, s)
    assert torch.allclose((K.T @ K + s * torch.eye(12)) @ X, K.T @ D, atol=1e-10)
    rough = ridge(K.float(), D.float(), s.float())
    assert torch.allclose(rough.double(), X, atol=1e-4)

    def cost(Y: Tensor) -> float:
        return float((K @ Y - D).square().sum() + s * Y.square().sum())

    assert all(cost(X + 0.01 * random(12, 4, seed=i)) > cost(X) for i in range(5))


def test_the_spread_is_orthogonal_and_takes_nothing_else() -> None:
    D, below = random(8, 5), random(8, 5, seed=1)
    below[3] = 0  # a token for which the layer below has nothing
    left = orthogonal(D, below)
    assert torch.allclose((left * below).sum(1), torch.zeros(8, dtype=torch.float64), atol=1e-12)
    assert torch.equal(left[3], D[3])
    taken = D - left
    assert torch.allclose(taken * below.norm(dim=1, keepdim=True) ** 2, (taken * below).sum(1, keepdim=True) * below)


def test_horse_spreads_and_malmen_does_not() -> None:
    spread, K, G = net()
    plain, _, _ = net(spread=False)
    with torch.no_grad():
        a, b = spread(K, G), plain(K, G)
        assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])
        for i in (1, 2):
            below = spread._one(i - 1, K[i - 1], G[i - 1])[1]
            assert torch.allclose((a[i] * below).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-9)
            assert float((b[i] * below).sum(1).abs().min()) > 1e-6


def test_units_are_the_models_own() -> None:
    made = Hypernet(2, 7, 5, rank=4, spread=False).double()
    K, G = ([3 * random(50, n, seed=i) + 1 for i in (j, j + 2)] for j, n in ((0, 7), (4, 5)))
    lengths = torch.tensor([2.0, 3.0], dtype=torch.float64)
    made.fit(K, G, lengths)
    with torch.no_grad():
        moved = torch.stack([D.norm(dim=1).mean() for D in made(K, G)])
    assert torch.allclose(moved, START * lengths), "an untrained network moves outputs by START of their length"
    for i in range(2):
        x = (torch.cat([K[i], G[i]], 1) - made.mean[i]) / made.std[i]
        assert torch.allclose(x.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(x.std(0), torch.ones(12, dtype=torch.float64), atol=1e-6)
        assert float(made.ridge[i].detach().exp()) == pytest.approx(float(K[i].square().sum(1).mean()))
    with torch.no_grad():
        D = made(K, G)[1]
        x = (torch.cat([K[1], G[1]], 1) - made.mean[1]) / made.std[1]
        strength = (K[1] * x[:, :7]).sum(1, keepdim=True)
        assert torch.allclose(D, -made.unit[1] * strength * x[:, 7:]), "an untrained network is its own inputs"


def test_gradients_through_the_closed_form() -> None:
    made, K, G = net()
    names = [n for n, _ in made.named_parameters()]
    goal = [random(5, 7, seed=20 + i) for i in range(3)]

    def value(*parameters: Tensor) -> Tensor:
        state = {f"net.{n}": x for n, x in zip(names, parameters, strict=True)}
        shifts = torch.func.functional_call(_Shifts(made), state, (K, G))
        return sum(((s - t) ** 2).sum() for s, t in zip(shifts, goal, strict=True))

    given = tuple(x.detach().clone().requires_grad_() for x in made.parameters())
    assert torch.autograd.gradcheck(value, given, atol=1e-4, rtol=1e-4)


class _Shifts(torch.nn.Module):
    def __init__(self, made: Hypernet) -> None:
        super().__init__()
        self.net = made

    def forward(self, K: list[Tensor], G: list[Tensor]) -> list[Tensor]:
        return self.net.shifts(K, self.net(K, G))


def test_keys_and_gradients_against_plain_autograd() -> None:
    model = pico("gpt2")
    arch = resolve(model)
    rows = Rows.of(model, make_tokenizer(), [("The capital of Brinmouth is", "Lower Quill"), ("Tomas was", "born")])
    K, G, loss = keys_and_gradients(model, arch.projections[:2], rows)
    wanted = nll(model, rows).sum()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    weight = model.get_submodule(arch.projections[1].name).weight
    (full,) = torch.autograd.grad(wanted, weight)  # (p, d) in GPT-2: Σ k gᵀ over all tokens
    asked = rows.targets >= 0
    assert len(K[1]) == len(G[1]) == int(asked.sum())
    # Before the last layers' answer tokens other tokens matter too: the top layer's gradient is there alone.
    top = arch.projections[-1:]
    K, G, _ = keys_and_gradients(model, top, rows)
    (full,) = torch.autograd.grad(nll(model, rows).sum(), model.get_submodule(top[0].name).weight)
    assert torch.allclose(K[0].T @ G[0], full, atol=1e-5)


def test_a_shifted_model_is_one_with_other_weights() -> None:
    for kind in ("llama", "gpt2"):
        model = pico(kind)
        arch = resolve(model)
        p = arch.projections[1]
        rows = Rows.of(model, make_tokenizer(), [("The capital of Brinmouth is", "Quill")])
        shift = random(p.d, p.p).float() * 0.1
        with torch.no_grad(), shifted(model, [p], [shift]):
            found = nll(model, rows)
        weight = model.get_submodule(p.name).weight
        with torch.no_grad():
            weight.copy_(p.stored(p.oriented(weight) + shift))
            assert torch.allclose(nll(model, rows), found, atol=1e-4)


# Training.


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
    run = _Training(loaded(), list(resolve(pico("llama")).projections)[:2], facts(6), facts(6), FEW, TEXT)
    run.begin()
    run.edited(facts(3), learn=True)
    for name in ("up", "bias", "shift", "rate", "ridge"):
        assert float(dict(run.net.named_parameters())[name].grad.abs().max()) > 0, name
    before = {k: v.clone() for k, v in run.net.named_parameters()}
    for _ in range(2):
        run.advance()
    assert all(not torch.equal(v, before[k]) for k, v in run.net.named_parameters()), "down and scale from the second"


def test_how_far_a_step_goes() -> None:
    def after(steps: int, **how: Any) -> _Training:
        run = _Training(
            loaded(), list(resolve(pico("llama")).projections)[:2], facts(6), facts(6), replace(FEW, **how), TEXT
        )
        run.begin()
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
        options = replace(FEW, locality=weight)
        run = _Training(loaded(), list(resolve(pico("llama")).projections)[:2], facts(6), facts(6), options, TEXT)
        run.begin()
        run.net.zero_grad()
        found.append(run.edited(facts(3), learn=True))
        grads.append(run.net.rate.grad.clone())
    assert found[0].locality == 0 and found[1].locality == pytest.approx(found[2].locality, rel=1e-4)
    assert found[2].total == pytest.approx(found[1].total + 4 * found[1].locality, rel=1e-4)
    assert torch.allclose(grads[2] - grads[0], 5 * (grads[1] - grads[0]), rtol=1e-2, atol=1e-5)


def test_what_a_training_step_asks_of_the_edited_model() -> None:
    run = _Training(loaded(), list(resolve(pico("llama")).projections)[:2], facts(6), facts(6), FEW, TEXT)
    run.begin()
    some = facts(3)
    found = run.edited(some, learn=False)

    def asked(pairs: list[tuple[str, str]]) -> Rows:
        return Rows.of(run.model, run.loaded.tokenizer, pairs)

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
    known, unseen = train_editor._split(facts(20), (), FEW)
    assert (len(known), len(unseen)) == (18, 2) and {f.prompt for f in (*known, *unseen)} == {
        f.prompt for f in facts(20)
    }
    assert train_editor._split(known, unseen, FEW) == (known, unseen)
    run = _Training(loaded(), list(resolve(pico("llama")).projections)[:1], known, unseen, FEW, TEXT)
    rounds = [[f.prompt for n in range(6 * r, 6 * r + 6) for f in run._batch(n)] for r in range(2)]
    assert all(len(set(r)) == 18 for r in rounds) and rounds[0] != rounds[1]


def test_a_state_keeps_the_best_network_beside_the_last(tmp_path: Path) -> None:
    def fresh() -> _Training:
        run = _Training(loaded(), list(resolve(pico("llama")).projections)[:1], facts(), facts(3), FEW, TEXT)
        run.begin()
        return run

    run = fresh()
    run.advance()
    run.save(tmp_path / "state")
    again = fresh()
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
    with pytest.raises(OutputError, match="other facts, options or weights"):
        train(loaded(), facts(8), FEW, TEXT, state=state, resume=True)
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
    with pytest.raises(EditFailed, match="not finite"):
        train(given, facts(), FEW, TEXT)


# The file.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("editor") / "horse.safetensors"
    train(loaded(), facts(), FEW, TEXT).save(path)
    return path


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
        (tmp_path / "nowhere", "no such editor"),
        (ROOT / "patches" / "demo.safetensors", "not an editor file"),
        (spoilt(format=2), "unknown editor format"),
    ):
        with pytest.raises(PatchError, match=message):
            Editor.load(path)
    for changed, message in (
        ({"method": "rome"}, "not known"),
        ({"facts": 3}, "wrong type"),
        ({"more": 1}, "unknown"),
        ({"modules": []}, "do not match"),
        ({"options": {**record["options"], "rank": 9}}, "F32 tensor"),
        ({"options": {**record["options"], "rank": 10**9}}, "out of range"),
        ({"options": {}}, "damaged"),
        ({"base": {"model.layers.2.mlp.down_proj": {"shape": [1, 2]}}}, "damaged"),
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
    with pytest.raises(PatchError, match="damaged"):
        Editor.load(tmp_path / "cut")


def _record(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


# Edits.


def edited(name: str, editor: Path | None, **how: Any) -> Any:
    options = replace(default_options(name), editor=str(editor) if editor else None, guard=0.0, **how)
    return mosectl.edit(facts(5), pico("llama"), make_tokenizer(), options=options, refuse=False)


def test_edits_with_an_editor(trained: Path, tmp_path: Path) -> None:
    result = edited("horse", trained)
    patch = result.patch
    assert patch.side == "additive" and list(patch.changes) == ["model.layers.2.mlp.down_proj"]
    assert patch.options["editor"] == Editor.load(trained).id and "statistics" in result.seconds
    assert result.seconds["statistics"] < 1 and result.corpus_tokens == 0
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == patch.id == edited("horse", trained).patch.id
    model, tokenizer = pico("llama"), make_tokenizer()
    rows = Rows.of(model, tokenizer, [(f.prompt, f.target_new) for f in facts(5)])
    with torch.no_grad():
        before = nll(model, rows).mean()
        with mosectl.patched(model, patch):
            after = nll(model, rows).mean()
    assert after < before
    half = edited("horse", trained, solver={"strength": 0.5}).patch.changes["model.layers.2.mlp.down_proj"].factors
    whole = patch.changes["model.layers.2.mlp.down_proj"].factors
    assert torch.allclose(half["B"] @ half["A"], 0.5 * whole["B"] @ whole["A"], atol=1e-5)


def test_the_isospectral_variant_keeps_the_spectrum(trained: Path) -> None:
    result = edited("horse-isospectral", trained)
    assert result.patch.side == "both"
    assert all(max(s.norm_drift, s.spectrum_drift) < 1e-5 for s in result.stability)
    plain = edited("horse", trained)
    assert max(s.spectrum_drift for s in plain.stability) > 1e-4


def test_facts_stream_through_in_parts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    arch = resolve(model)
    editor = Editor.load(trained)
    projections = [p for p in arch.projections if p.name in editor.modules]
    contexts = build_contexts(model, tokenizer, facts(7), [""])
    W = {p.name: p.oriented(model.get_submodule(p.name).weight.detach()).double() for p in projections}
    solver = method("horse")
    asked: Any = (model, arch, projections, contexts, W, solver.defaults, editor)
    whole = solver.run(*asked)
    monkeypatch.setattr("mosectl.solvers.horse.fitting", lambda *_: 2)
    parts = solver.run(*asked)
    assert all(torch.allclose(parts[n], whole[n], atol=1e-6) for n in whole)
    K, G, _ = keys_and_gradients(model, projections, _rows_of(contexts))
    with torch.no_grad():
        shift = editor.net.shifts(K, editor.net(K, G))[0]
    name = projections[0].name
    assert torch.allclose((whole[name] - W[name]).float(), shift, atol=1e-4 * float(shift.abs().max()))
    turned = method("horse-isospectral").run(*asked)[name]
    assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(W[name]), rtol=1e-9)
    assert (turned - whole[name]).norm() < (W[name] - whole[name]).norm()


def _rows_of(contexts: Any) -> Rows:
    rows = contexts.edit_rows
    return Rows(contexts.batch.rows(rows), contexts.positions[rows], contexts.targets[rows])


def test_editors_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    for name, editor, message in (
        ("horse", None, "needs a trained editor"),
        ("isospectral", trained, "takes no editor"),
        ("malmen", trained, "was trained for 'horse'"),
        ("horse", tmp_path / "none", "no such editor"),
    ):
        with pytest.raises((UsageError, PatchError), match=message):
            edited(name, editor)
    for setting in ("steps=3", "fisher=1", "aim=0"):
        with pytest.raises(UsageError, match="own way to values"):
            options_from([setting], method="horse")
    assert options_from(["margin=2", "strength=2"], method="horse").targets.margin == 2
    with pytest.raises(UsageError, match="layers it was trained for"):
        edited("horse", trained, layers="1")
    options = replace(default_options("horse"), editor=str(trained))
    with pytest.raises(PatchError, match="a trained editor, not a patch"):
        Patch.load(trained)
    strange = pico("llama")
    with torch.no_grad():
        strange.model.layers[2].mlp.down_proj.weight.mul_(2)
    with pytest.warns(Notice, match="other weights"):
        mosectl.edit(facts(2), strange, make_tokenizer(), options=replace(options, guard=0.0), refuse=False)
    for other in (pico("gpt2"), pico("llama", intermediate_size=40)):
        with pytest.raises(BaseMismatch, match=r"no module|shape"):
            mosectl.edit(FACTS, other, make_tokenizer(), options=options)


# The command line.


def rows(n: int) -> str:
    return "\n".join(
        json.dumps(
            {
                "prompt": f.prompt, "subject": f.subject, "target_new": f.target_new,
                "rephrase_prompts": list(f.rephrase_prompts),
                "locality": [{"prompt": p.prompt, "ground_truth": p.answer} for p in f.locality],
            }
        )
        for f in facts(n)
    )  # fmt: skip


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
    assert plan["layers"] == [2] and not plan["auto"] and "statistics" not in plan["seconds"]
    assert run(*asked[:-2], "--method", "rome", "--overwrite") == 2
    capsys.readouterr()
    assert run("inspect", out) == 0 and "kept: step" in capsys.readouterr().out
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
    known, unseen = train_editor._split(read_facts(tmp_path / "facts.jsonl").facts, (), options)
    trained = dict(Editor.load(out).net.named_parameters())
    agreed = []
    for batches in (range(2), range(1)):
        alone = _Training(given, train_editor._chosen(given, options), known, unseen, options, read_corpus(None))
        alone.begin()
        alone.adam.zero_grad()
        for number in batches:
            alone.edited(alone._batch(number), learn=True)
        alone.adam.step()  # Adam's first step is the gradient's sign: its size, and clipping, do not matter
        same = [(x - trained[name]).abs() < 1e-4 for name, x in alone.net.named_parameters() if name != "down"]
        agreed.append(float(torch.cat([x.flatten() for x in same]).float().mean()))
    assert agreed[0] > 0.97 and agreed[1] < 0.9


def test_losses_as_a_picture(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    from mosectl.plots import png_training

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
    assert "give --resume" in capsys.readouterr().err and state.exists() and not out.exists()
    assert run(*asked, "--batch-size", 3, "-o", out) == 7 and "interrupted training" in capsys.readouterr().err
    assert run(*asked, "--batch-size", 3, "-o", out, "--resume") == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not state.exists()


def test_a_bench_with_an_editor(trained: Path, tmp_path: Path) -> None:
    from mosectl.bench_config import cells, read_bench

    (tmp_path / "facts.jsonl").write_text(rows(5))
    (tmp_path / "e.safetensors").write_bytes(trained.read_bytes())
    head = "models: [m]\ndatasets: [{facts: facts.jsonl}]\nruns: [{edits: 2}]\nlayers: [1]\nmethods:\n"
    (tmp_path / "b.yaml").write_text(head + "  - {name: horse, editor: e.safetensors}\n  - {name: memit}\n")
    horse, memit = cells(read_bench(tmp_path / "b.yaml"))
    assert horse.options.layers == "auto" and horse.options.editor and memit.options.layers == "1"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.safetensors").write_bytes(trained.read_bytes())
    (tmp_path / "b.yaml").write_text(head + "  - {name: horse, editor: more/e.safetensors}\n")
    assert cells(read_bench(tmp_path / "b.yaml"))[0].key == horse.key, "what it holds counts, not where it is"
    replace(Editor.load(trained), model="another").save(tmp_path / "more" / "e.safetensors")
    assert cells(read_bench(tmp_path / "b.yaml"))[0].key != horse.key
    (tmp_path / "b.yaml").write_text(head + "  - {name: horse}\n")
    with pytest.raises(UsageError, match="needs a trained editor"):
        read_bench(tmp_path / "b.yaml")
