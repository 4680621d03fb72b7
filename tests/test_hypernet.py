"""HORSE and MALMEN: the closed form, its gradients, and edits with a trained network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mosectl
from mosectl.editing.contexts import build_contexts
from mosectl.editing.edited_layers import EditedLayers
from mosectl.editing.methods import method
from mosectl.editing.methods.base import ModelProblem
from mosectl.editing.options import default_options, options_from
from mosectl.errors import BaseMismatch, EditFailed, Notice, PatchError, UsageError
from mosectl.hypernetwork.file import Editor
from mosectl.hypernetwork.network import START, Hypernet, keys_and_gradients, nll, orthogonal, ridge, shifted
from mosectl.model.architecture import resolve
from mosectl.model.scoring import Rows
from mosectl.patch.file import Patch
from support.editors import asked as rows_asked
from support.editors import facts, rows
from support.facts import FACTS
from support.models import make_tokenizer, pico


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    rows = rows_asked(model, make_tokenizer(), [("The capital of Brinmouth is", "Lower Quill"), ("Tomas was", "born")])
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
        rows = rows_asked(model, make_tokenizer(), [("The capital of Brinmouth is", "Quill")])
        shift = random(p.d, p.p).float() * 0.1
        with torch.no_grad(), shifted(model, [p], [shift]):
            found = nll(model, rows)
        weight = model.get_submodule(p.name).weight
        with torch.no_grad():
            weight.copy_(p.stored(p.oriented(weight) + shift))
            assert torch.allclose(nll(model, rows), found, atol=1e-4)


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
    rows = rows_asked(model, tokenizer, [(f.prompt, f.target_new) for f in facts(5)])
    with torch.no_grad():
        before = nll(model, rows).mean()
        with mosectl.patched(model, patch):
            after = nll(model, rows).mean()
    assert after < before
    half = edited("horse", trained, solver={"strength": 0.5}).patch.changes["model.layers.2.mlp.down_proj"].factors
    whole = patch.changes["model.layers.2.mlp.down_proj"].factors
    assert torch.allclose(half["B"] @ half["A"], 0.5 * whole["B"] @ whole["A"], atol=1e-5)


def test_the_isospectral_variant_keeps_the_spectrum(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditedLayers, "_compact", lambda _: pytest.fail("minutes of a search that finds nothing"))
    result = edited("horse-isospectral", trained)
    assert result.patch.side == "both" and result.corpus_tokens == 0, (
        "no statistics for a compact form that is not sought"
    )
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
    asked = ModelProblem(model, arch, projections, contexts, W, solver.defaults, editor)
    whole = solver.fit(asked)
    monkeypatch.setattr("mosectl.editing.methods.horse.fitting", lambda *_: 2)
    parts = solver.fit(asked)
    assert all(torch.allclose(parts[n], whole[n], atol=1e-6) for n in whole)
    K, G, _ = keys_and_gradients(model, projections, _rows_of(contexts))
    with torch.no_grad():
        shift = editor.net.shifts(K, editor.net(K, G))[0]
    name = projections[0].name
    assert torch.allclose((whole[name] - W[name]).float(), shift, atol=1e-4 * float(shift.abs().max()))
    turned = method("horse-isospectral").fit(asked)[name]
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
        ("horse", tmp_path / "none", "no such file"),
    ):
        with pytest.raises((UsageError, PatchError), match=message):
            edited(name, editor)
    for setting in ("steps=3", "optimizer=natural-gradient", "placement=per-layer"):
        with pytest.raises(UsageError, match="own way to values"):
            options_from([setting], method="horse")
    with pytest.raises(UsageError, match="no such setting") as refused:
        options_from(["preserve=2"], method="horse")
    assert "strength" in str(refused.value.fix) and "steps" not in str(refused.value.fix)
    with pytest.raises(EditFailed, match="harms the model") as harmed:
        strong = replace(default_options("horse"), editor=str(trained), solver={"strength": 1000.0})
        mosectl.edit(facts(2), pico("llama"), make_tokenizer(), options=strong, refuse=False)
    assert "strength" in str(harmed.value.fix) and "preserve" not in str(harmed.value.fix)
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


def test_a_bench_with_an_editor(trained: Path, tmp_path: Path) -> None:
    from mosectl.bench.config import cells, read_bench

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
    with pytest.raises(UsageError, match=r"methods\[0\].*editor.*needs a trained editor"):
        read_bench(tmp_path / "b.yaml")
