"""The baselines as published: their search and their way over the layers, against a second writing in float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mosectl
from mosectl.editing.contexts import Contexts, build_contexts
from mosectl.editing.methods import method, names
from mosectl.editing.methods.base import BLOCK, FFN, Published
from mosectl.editing.options import default_options, options_from
from mosectl.editing.plan import estimate
from mosectl.editing.previous_edits import Earlier
from mosectl.editing.published import ENOUGH, OPENINGS, averages, bare_rows, published_targets, written_prefixes
from mosectl.editing.second_moments import Moments
from mosectl.editing.targets import TargetOptions, Targets
from mosectl.errors import UsageError
from mosectl.facts.records import fact_from_dict
from mosectl.model.architecture import resolve
from mosectl.model.forward import keys_at
from mosectl.model.weights import weight_of
from support.facts import CORPUS, FACTS
from support.models import make_tokenizer, pico, save

BASELINES = ("rome", "memit", "rect", "emmet", "prune", "alphaedit")
PREFIXES = ["", "The town is. ", "You play. "]
HOW = TargetOptions(optimizer="published", steps=6, step_size=0.05, max_displacement=0.5, decay=3.0, kl_weight=0.5)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return str(tmp_path / "corpus.txt")


def contexts(model: Any, n: int = 2) -> Contexts:
    return build_contexts(model, make_tokenizer(), [fact_from_dict(f, "x") for f in FACTS[:n]], PREFIXES)


class Reference:
    """One fact's search in float64: whole forwards, one row at a time."""

    def __init__(self, model: Any, c: Contexts, fact: int, layer: int, site: str) -> None:
        self.model, self.site = deepcopy(model).double(), site
        block = self.model.model.layers[layer]
        self.module = block if site == BLOCK else block.mlp
        self.rows = []
        for r in (c.fact == fact).nonzero().flatten().tolist():
            ids = c.batch.input_ids[r][c.batch.attention_mask[r].bool()]
            asked = [(int(at), int(t)) for at, t in zip(c.positions[r], c.targets[r], strict=True) if t >= 0]
            self.rows.append((ids[None], int(c.token[r]), asked))
        self.seen: list[Tensor] = []

    def logp(self, ids: Tensor, at: int, delta: Tensor) -> Tensor:
        def hook(_: Any, __: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            self.seen.append(h[0, at].detach().clone())
            moved = h + torch.zeros_like(h).index_put((torch.tensor(0), torch.tensor(at)), delta)
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = self.module.register_forward_hook(hook)
        logits = self.model(input_ids=ids).logits[0]
        handle.remove()
        return logits.log_softmax(-1)

    def search(self, o: TargetOptions, enough: float) -> tuple[Tensor, int]:
        """δ and the number of its steps: Adam written out, the sum's derivative by autograd."""
        delta, m, v = torch.zeros(3, 32, dtype=torch.float64)
        before: Tensor | None = None
        for step in range(1, o.steps + 1):
            delta = delta.detach().requires_grad_()
            losses = []
            for ids, at, asked in self.rows:
                logp = self.logp(ids, at, delta)
                if asked:
                    losses.append(-sum(logp[p, t] for p, t in asked) / len(asked))
                else:  # "{subject} is a", the word after the subject
                    before = logp[at].detach() if before is None else before
                    kl = (logp[at].exp() * (logp[at] - before)).sum()
            norm = self.seen[0].norm()  # of the bare prompt, the first row, before any step
            total = sum(losses) / len(losses) + o.kl_weight * kl + o.decay * delta.norm() / norm**2
            if total < enough or step == o.steps:
                return delta.detach(), step - 1
            (g,) = torch.autograd.grad(total, delta)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moved = delta.detach() - o.step_size * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            delta = moved * min(1.0, float(o.max_displacement * norm / moved.norm()))
        raise AssertionError


@pytest.mark.parametrize("site", [BLOCK, FFN])
@pytest.mark.parametrize("how", [{}, {"max_displacement": 0.02}, {"enough": 5.6}])
def test_the_search_is_the_published_one(site: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    how, enough = dict(how), how.get("enough", 0.05)
    how.pop("enough", None)
    assert ENOUGH == 0.05
    monkeypatch.setattr("mosectl.editing.published.ENOUGH", enough)
    model, o = pico("llama"), replace(HOW, **how)
    arch, c = resolve(model), contexts(model)
    found = published_targets(model, arch, arch.projections[1], c, o, site)
    for fact in range(2):
        delta, steps = Reference(model, c, fact, 1, site).search(o, enough)
        assert int(found.steps[fact]) == steps
        # Where a gradient is nearly 0, Adam's step is either way in float32.
        assert float((found.V[0][fact] - delta).norm() / delta.norm()) < 0.02, (fact, site)
    assert bool(found.converged.any()) == (enough > 1)


def test_facts_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("llama")
    arch, c = resolve(model), contexts(model)
    together = published_targets(model, arch, arch.projections[0], c, HOW, BLOCK)
    monkeypatch.setattr("mosectl.editing.targets.fitting", lambda *_: 1)
    alone = published_targets(model, arch, arch.projections[0], c, HOW, BLOCK)
    assert torch.allclose(together.V[0], alone.V[0], atol=1e-4)


def test_half_of_a_key_is_the_bare_prompts() -> None:
    fact = torch.tensor([0, 0, 0, 1, 2, 2])
    half = [[0.5, 0.25, 0.25, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]
    assert averages(fact, 0.5).tolist() == half
    assert torch.allclose(averages(fact, 0)[0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0, 0]).double())
    assert bare_rows(contexts(pico("llama"))).tolist() == [0, 4], "three prompts and the KL row of each fact"


def given_targets(monkeypatch: pytest.MonkeyPatch, delta: Tensor) -> None:
    """Every search finds ``delta`` (n, d)."""

    def found(*_: object) -> Targets:
        n = len(delta)
        loss, done = torch.ones(n), torch.zeros(n, dtype=torch.bool)
        return Targets([delta], loss, -loss, done, done.long(), loss, -loss)

    monkeypatch.setattr("mosectl.editing.session.published_targets", found)
    monkeypatch.setattr("mosectl.editing.edit.written_prefixes", lambda *_: PREFIXES)


def by_hand(model: Any, c: Contexts, delta: Tensor, C: dict[int, Tensor], weigh: float) -> dict[int, Tensor]:
    """MEMIT's change of layers 0 and 1 in float64 (2210.07229, algorithm 1): bare prompts' residuals, half-half keys."""
    model, changes = deepcopy(model).double(), {}
    seen: dict[str, Tensor] = {}
    layers = model.model.layers
    layers[1].register_forward_hook(lambda _, __, out: seen.update(h=out[0] if isinstance(out, tuple) else out))
    for i in (0, 1):
        layers[i].mlp.down_proj.register_forward_hook(lambda _, a, __, i=i: seen.update({f"k{i}": a[0]}))

    def states(i: int) -> tuple[Tensor, Tensor]:
        """Keys (p, n) of layer i and hidden states (d, n) behind layer 1."""
        keys, hidden = [], []
        for fact in range(2):
            rows = ((c.fact == fact) & c.is_edit).nonzero().flatten().tolist()
            k = []
            for r in rows:
                model(input_ids=c.batch.input_ids[r][c.batch.attention_mask[r].bool()][None])
                k.append(seen[f"k{i}"][0, int(c.token[r])])
                if r == rows[0]:
                    hidden.append(seen["h"][0, int(c.token[r])])
            keys.append((k[0] + sum(k[1:]) / (len(k) - 1)) / 2)
        return torch.stack(keys, 1).detach(), torch.stack(hidden, 1).detach()

    wanted = states(0)[1] + delta.double().T
    for i in (0, 1):
        K, hidden = states(i)
        changes[i] = (wanted - hidden) / (2 - i) @ K.T @ torch.linalg.inv(weigh * C[i].double() + K @ K.T)
        layers[i].mlp.down_proj.weight.data += changes[i]
    return changes


@pytest.mark.parametrize("name", ["memit", "rect"])
def test_the_residual_goes_over_the_layers_as_published(
    name: str, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, delta = pico("llama"), torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    given_targets(monkeypatch, delta)
    ps = resolve(model).projections[:2]
    C = {p.name: torch.cov(torch.randn(p.p, 200, generator=torch.Generator().manual_seed(p.layer))) for p in ps}
    G = {p.name: torch.eye(p.d) for p in ps}
    monkeypatch.setattr("mosectl.editing.edit.second_moments", lambda *_, **__: Moments(C, G, 200, False, 0.0))
    expected = by_hand(model, contexts(model), delta, {p.layer: C[p.name] for p in ps}, 2.0)
    o = replace(default_options(name), corpus=corpus, layers="0,1", guard=0, solver={"preserve": 2.0})
    patch = mosectl.edit(FACTS[:2], model, make_tokenizer(), options=o, refuse=False).patch
    for p in ps:
        factors = patch.changes[p.name].factors
        change = (factors["B"] @ factors["A"]).double()
        whole = expected[p.layer]
        if name == "rect":  # its entries are chosen once both layers are solved
            relative = (whole / p.oriented(weight_of(model, p).detach()).double()).abs()
            whole = whole * (
                relative >= relative.flatten().sort(descending=True).values[round(0.4 * whole.numel()) - 1]
            )
        assert torch.allclose(change, whole, atol=1e-3 * float(whole.abs().max())), p.name


def test_earlier_keys_are_means_too() -> None:
    model = pico("llama")
    (p,) = resolve(model).projections[:1]
    c = contexts(model)
    earlier = Earlier(model, [p], lambda fact: averages(fact, 0.5))
    earlier.add(c, [1.0, 1.0], {p.name: p.oriented(weight_of(model, p).detach()).double()})
    (k,) = keys_at(model, [p], c.batch.rows(c.edit_rows), c.token[c.edit_rows])
    k = k.double()
    means = [(k[3 * i] + (k[3 * i + 1] + k[3 * i + 2]) / 2) / 2 for i in (0, 1)]
    P, _ = earlier.moments(1.0)[p.name]
    assert torch.allclose(P, sum(torch.outer(m, m) for m in means), atol=1e-6)


def test_prefixes_are_written_by_the_model() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    found = written_prefixes(model, tokenizer, 20, (5, 10), 0)
    assert len(found) == 21 and found[0] == "" and all(f.endswith(". ") for f in found[1:])
    assert all(f.startswith(OPENINGS[i % 5]) for i, f in enumerate(found[1:]))
    assert (
        found
        == written_prefixes(model, tokenizer, 20, (5, 10), 0)
        != written_prefixes(model, tokenizer, 20, (5, 10), 1)
    )
    asked: list[tuple[int, Any]] = []
    real = model.generate
    model.generate = lambda **how: (
        asked.append((how["input_ids"].shape[1] + how["max_new_tokens"], how["top_k"])) or real(**how)
    )
    written_prefixes(model, make_tokenizer(), 20, (12, 15), 0)
    assert asked == [(12, 5)] * 10 + [(15, 5)] * 10


@pytest.mark.parametrize(
    "family,n,memit,rome",
    [
        ("llama", 32, (4, 5, 6, 7, 8), (5,)), ("gpt2", 48, (13, 14, 15, 16, 17), (17,)),
        ("gptj", 28, (3, 4, 5, 6, 7, 8), (5,)), ("llama", 30, (3, 4, 5, 6, 7), (4,)), ("qwen2", 2, (0,), (0,)),
        ("llama", 1, (0,), (0,)),
    ],
)  # fmt: skip
def test_layers_by_depth(family: str, n: int, memit: tuple[int, ...], rome: tuple[int, ...]) -> None:
    assert method("memit").published.edited(family, n) == memit
    assert method("rome").published.edited(family, n) == method("emmet").published.edited(family, n) == rome


def test_a_name_means_the_published_settings() -> None:
    """EasyEdit's hparams for Llama 2 7B, Llama 3.2 3B and Qwen 2.5 7B; L2, threshold and α of the methods' own code."""
    for name in BASELINES:
        o, solver = default_options(name), method(name)
        t = o.targets
        assert (t.optimizer, t.steps, t.step_size, t.max_displacement, t.decay, t.kl_weight) == (
            "published", 25, 0.5, 4.0, 1e-3, 0.0625,
        )  # fmt: skip
        assert (o.rounds, o.wordings, t.preserve_norm, o.replay_margin) == (1, 0, 0, 0.0)
        assert o.previous_edit_weight == (name == "alphaedit")
        rome = name == "rome"
        assert (o.prefixes, solver.published.lengths) == ((20, (5, 10)) if rome else (5, (10,)))
        assert (solver.published.bare, solver.published.site) == ((0, FFN) if rome else (0.5, BLOCK))
    defaults = {name: method(name).defaults for name in BASELINES}
    assert {n: d.get("preserve") for n, d in defaults.items() if "preserve" in d} == {
        "memit": 15_000, "rect": 15_000, "prune": 15_000, "emmet": 1,
    }  # fmt: skip
    assert defaults["alphaedit"] == {"threshold": 0.02, "ridge": 10, "relative": 0}
    assert defaults["emmet"]["ridge"] == 0.1 and defaults["rect"]["keep"] == 0.4 and defaults["prune"]["base"] == 1.2
    published = {n for n in names() if default_options(n).published}
    assert published == {*BASELINES, "ft", "ultraedit", "crispedit"}


def test_one_target_cannot_be_one_a_layer() -> None:
    with pytest.raises(UsageError, match="one target"):
        options_from(["placement=per-layer"], method="memit")
    assert options_from(["placement=per-layer", "optimizer=adam"], method="memit").placement == "per-layer"


def test_auto_means_the_published_layers(corpus: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", num_hidden_layers=8)
    for name, layers in (("memit", [1, 2, 3, 4, 5]), ("rome", [1])):
        o = replace(default_options(name), corpus=corpus, guard=0, prefixes=0)
        o = replace(o, targets=replace(o.targets, steps=3))
        planned = estimate(folder, [fact_from_dict(FACTS[0], "x")], o)
        assert list(planned.layers) == layers and not planned.auto
        result = mosectl.edit(FACTS[:1], folder, options=o, refuse=False)
        assert result.patch.options["layers"] == layers and result.layers == ()


def test_rome_takes_one_fact_a_batch(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def search(*given: Any) -> Targets:
        sizes.append(int(given[3].fact.max()) + 1)
        return published_targets(*given)

    monkeypatch.setattr("mosectl.editing.session.published_targets", search)
    for name, size, expected in (("rome", 0, [1, 1]), ("rome", 2, [2]), ("memit", 0, [2])):
        sizes.clear()
        o = replace(default_options(name), corpus=corpus, guard=0, prefixes=0, layers="1", batch_size=size)
        mosectl.edit(
            FACTS[:2],
            pico("llama"),
            make_tokenizer(),
            options=replace(o, targets=replace(o.targets, steps=2)),
            refuse=False,
        )
        assert sizes == expected


def test_an_edit_that_brings_nothing_is_made_all_the_same(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_targets(monkeypatch, torch.randn(2, 32, generator=torch.Generator().manual_seed(2)))
    o = replace(default_options("memit"), corpus=corpus, guard=0, layers="1", solver={"preserve": 1e-3})
    result = mosectl.edit(FACTS[:2], pico("llama"), make_tokenizer(), options=o, refuse=False)
    assert all(s.norm_drift > 1e-4 for s in result.stability), "no round is compared with doing nothing"


def test_other_methods_can_take_the_published_search(corpus: str) -> None:
    o = replace(options_from(["optimizer=published", "guard=0"], corpus=corpus), layers="0,1", rounds=1, prefixes=2)
    assert isinstance(method("isospectral").published, Published)
    result = mosectl.edit(FACTS[:1], pico("llama"), make_tokenizer(), options=o, refuse=False)
    assert result.facts[0].probability_after > result.facts[0].probability_before


def test_statistics_are_of_all_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own editor stops reading once C is known well enough; what is held to its publication is not given less."""
    text = tmp_path / "long.txt"
    text.write_text("\n".join([CORPUS] * 20))
    monkeypatch.setattr("mosectl.editing.second_moments.BLOCK", 30)
    monkeypatch.setattr("mosectl.editing.layers.LOW", 10.0)
    read = {}
    for run, name in (("first", "isospectral"), ("published", "memit"), ("again", "isospectral")):
        options = replace(default_options(name), corpus=str(text), layers="0", wordings=0)
        options = replace(options, targets=replace(options.targets, steps=1))
        done = mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=options, refuse=False)
        read[run] = done.corpus_tokens
    assert read["first"] < 60 < 400 < read["published"] == read["again"], (
        "better statistics that are kept serve as well"
    )
