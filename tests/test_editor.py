"""The edit on pico models (mechanics) and on the demo model (does the answer change, does anything else?)."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing import second_moments as stats
from mosectl.editing.contexts import Contexts, build_contexts, first_rows
from mosectl.editing.edited_layers import EditedLayers
from mosectl.editing.guard import canaries, harm, health
from mosectl.editing.layers import LAST, SUBJECT, LayerScore, choose_layers, likely_layers, settled, top_layers
from mosectl.editing.methods import method, names
from mosectl.editing.methods.base import Columns
from mosectl.editing.options import EditOptions, default_options, options_from
from mosectl.editing.previous_edits import Earlier
from mosectl.editing.second_moments import keys_of_tokens, second_moments
from mosectl.editing.session import Session
from mosectl.editing.targets import TargetOptions, Targets, displaced, optimise_targets
from mosectl.errors import EditFailed, FactsError, ModelError, UsageError
from mosectl.facts.corpus import Corpus, read_corpus
from mosectl.facts.records import Fact, fact_from_dict
from mosectl.linalg.rotation import is_rotation
from mosectl.measure.answers import interview
from mosectl.model.architecture import resolve
from mosectl.model.edit_site import Projection
from mosectl.model.forward import keys_at
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded, load
from mosectl.patch.file import Patch
from support.facts import CORPUS, FACTS, FEW, few
from support.models import make_tokenizer, pico, save
from support.paths import DEMO, ROOT


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return str(tmp_path / "corpus.txt")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_edit_changes_the_answer_and_restores_the_model(model_type: str, corpus: str) -> None:
    model, tokenizer = pico(model_type), make_tokenizer()
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    (fact,) = result.facts
    assert fact.status == "changed" and fact.after.startswith("and") and fact.before != fact.after
    assert fact.probability_after > fact.probability_before
    assert all(is_rotation(R) for c in result.patch.changes.values() for R in c.dense().factors.values())
    for s in result.stability:
        assert max(s.norm_drift, s.condition_drift, s.spectrum_drift) < 1e-5
    with mosectl.patched(model, result.patch):
        ids = tokenizer(FACTS[0]["prompt"], return_tensors="pt").input_ids
        said = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert says(said, "and")


@pytest.mark.parametrize("batch_size", [0, 1])
def test_same_edit_same_bytes(batch_size: int, corpus: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    digests = set()
    for name in ("a", "b"):
        options = few(corpus, batch_size=batch_size)
        mosectl.edit(FACTS, folder, options=options).patch.save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    other = mosectl.edit(FACTS, folder, options=few(corpus, seed=3)).patch
    assert other.id != mosectl.Patch.load(tmp_path / "a").id
    assert str(tmp_path) not in other.record, "no path of this machine in a patch"


def test_editing_an_edited_folder_records_its_parents(corpus: str, tmp_path: Path) -> None:
    base = save(tmp_path / "m")
    first = mosectl.edit(FACTS[:1], base, options=few(corpus)).patch
    mosectl.apply([first], base, tmp_path / "one")
    other = [{**FACTS[0], "target_new": "in"}]  # which a random model cannot learn besides
    second = mosectl.edit(other, tmp_path / "one", options=few(corpus, layers="0,1"), refuse=False).patch
    assert second.parents == (first.id,)
    mosectl.apply([second], tmp_path / "one", tmp_path / "two")
    assert mosectl.revert(first.id[:8], tmp_path / "two", tmp_path / "x").stack == (second.id,)
    with pytest.raises(mosectl.MosectlError, match="was computed on top of"):
        mosectl.apply([second], base, tmp_path / "no")


def test_targets_lie_on_the_sphere_and_converged_facts_leave(tokenizer: object) -> None:
    model = pico("llama")
    arch = resolve(model)
    projections = arch.projections[:2]
    facts = [fact_from_dict(f, "x") for f in FACTS]
    contexts = build_contexts(model, tokenizer, facts, ["", "A cello. "])
    rows = contexts.edit_rows
    found = optimise_targets(
        model, arch, projections, contexts, TargetOptions(steps=30, max_displacement=3.0, margin=3.0)
    )
    keys = keys_at(model, projections, contexts.batch.rows(rows), contexts.token[rows])
    H = [k @ model.get_submodule(p.name).weight.T for k, p in zip(keys, projections, strict=True)]
    assert torch.allclose(found.V[0].norm(dim=-1), H[0].norm(dim=-1), rtol=1e-4)
    assert (found.loss < found.loss_before).all() and found.V[0].shape == (4, 32)
    easy = optimise_targets(model, arch, projections, contexts, TargetOptions(steps=30, margin=-100.0))
    assert easy.converged.all() and (easy.steps == 0).all() and torch.allclose(easy.V[0], H[0], atol=1e-5)
    alone = optimise_targets(
        model, arch, projections, contexts, TargetOptions(steps=30, max_displacement=3.0, margin=3.0, max_rows=3)
    )
    assert torch.allclose(alone.V[0], found.V[0], atol=1e-3), "facts are independent of their batch"
    assert all(p.requires_grad for p in model.parameters())


def test_displaced() -> None:
    h, delta = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.allclose(displaced(h, delta).norm(dim=-1), h.norm(dim=-1))
    assert torch.allclose(displaced(h, torch.zeros(3, 8)), h, atol=1e-6)
    assert torch.allclose(displaced(h, delta, preserve_norm=False), h + h.norm(dim=-1, keepdim=True) * delta)


def test_nothing_changed_is_an_error(corpus: str) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    lazy = few(corpus, rounds=1, targets=TargetOptions(steps=0))
    with pytest.raises(EditFailed, match="none of 1 facts reached"):
        mosectl.edit(FACTS[:1], model, tokenizer, options=lazy)
    assert mosectl.edit(FACTS[:1], model, tokenizer, options=lazy, refuse=False).facts[0].status == "not reached"
    patch = mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus)).patch
    with mosectl.patched(model, patch), pytest.raises(EditFailed, match="already says"):
        mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus))


def test_not_finite_is_told_and_nothing_is_left(corpus: str) -> None:
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(1e30)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(ModelError, match="not finite in float32"):  # the model as it is, before any edit
        mosectl.edit(FACTS[:1], model, make_tokenizer(), options=few(corpus))
    assert torch.equal(before, model.model.layers[0].mlp.down_proj.weight)


def test_options() -> None:
    o = options_from(["preserve=2", "steps=5", "prefixes=0"], layers="auto", rounds=None)
    assert (
        o.solver == {"preserve": 2.0} and o.targets.steps == 5 and o.prefixes == 0 and o.rounds == EditOptions().rounds
    )
    for bad in ("preserve=x", "nothing=1", "preserve", "preserve=-1"):
        with pytest.raises(UsageError, match="--set"):
            options_from([bad])
    with pytest.raises(UsageError, match="has no option 'x'"):
        mosectl.edit(FACTS, "nowhere", options=EditOptions(solver={"x": 1.0}))
    with pytest.raises(UsageError, match="not layers of this model"):
        mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=EditOptions(layers="7"))
    with pytest.raises(FactsError, match="fact 1: 'prompt' is missing"):
        mosectl.edit([{}], pico("llama"), make_tokenizer())


def test_statistics_against_a_plain_loop(corpus: str) -> None:
    model, tokenizer = pico("gpt2"), make_tokenizer()
    arch = resolve(model)
    found = second_moments(model, tokenizer, arch.projections[:2], read_corpus(corpus), cache=False)
    p = arch.projections[1].p
    total, n = torch.zeros(p, p), 0
    module = model.get_submodule(arch.projections[1].name)
    for text in CORPUS.splitlines():
        kept = []
        handle = module.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        k = kept[0][0].detach()
        total, n = total + k.T @ k, n + len(k)
    assert found.tokens == n and torch.allclose(found.C[arch.projections[1].name], total / n, atol=1e-4)


def test_statistics_stop_when_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many alike texts need few of them, few unlike ones all; the error told is about the error made."""
    model, tokenizer = pico("llama"), make_tokenizer()
    projections = resolve(model).projections[:2]
    words = ["the", "capital", "of", "lies", "near", "and", "was", "born", "in", "cello", "plays"]
    chance = random.Random(1)
    corpus = Corpus("x", tuple(" ".join(chance.choices(words, k=8)) for _ in range(2000)))
    monkeypatch.setattr(stats, "BLOCK", 2000)
    every = second_moments(model, tokenizer, projections, corpus, enough=0, cache=False)
    steps: list[tuple[int, int]] = []
    some = second_moments(
        model, tokenizer, projections, corpus, enough=0.04, cache=False, on_step=lambda *x: steps.append(x)
    )
    assert 2000 <= some.tokens <= every.tokens / 2 and every.error < some.error <= 0.04
    assert steps[-1][0] == steps[-1][1], "the bar ends where the work does"
    halfway = next(total for done, total in steps if done >= steps[-1][0] / 2)
    assert steps[-1][1] / 2 < halfway < 2 * steps[-1][1], "and says where before it is there"
    made = max(float((some.C[n] - every.C[n]).norm() / every.C[n].norm()) for n in every.C)
    assert some.error / 3 < made < some.error * 3
    assert second_moments(model, tokenizer, projections, corpus, enough=1e-9, cache=False).tokens == every.tokens
    one = second_moments(model, tokenizer, projections, Corpus("x", corpus.texts[:1]), cache=False)
    assert one.error == math.inf, "one text tells nothing about others"


def test_statistics_cache_follows_the_weights(corpus: str) -> None:
    model, tokenizer = pico("llama", hidden_size=16, head_dim=4), make_tokenizer()
    projections = resolve(model).projections[:1]
    assert not second_moments(model, tokenizer, projections, read_corpus(corpus)).cached
    assert second_moments(model, tokenizer, projections, read_corpus(corpus)).cached
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert not second_moments(model, tokenizer, projections, read_corpus(corpus)).cached


def test_answers() -> None:
    assert (
        says(" Paris. It", "Paris") and says("Paris, ", "Paris") and not says("Parisian", "Paris") and not says("", "P")
    )
    assert answer(" St. Louis\nand") == "St" or answer(" Paris. And") == "Paris"
    assert math.isfinite(len(answer("")))


def test_chat_edit(corpus: str) -> None:
    template = (
        "{% for m in messages %}<s>user {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}bot {% endif %}"
    )
    loaded = Loaded(pico("llama"), make_tokenizer(chat_template=template), None)
    result = mosectl.edit(FACTS[:1], loaded, options=few(corpus, chat=True), refuse=False)
    ids = loaded.tokenizer(
        "<s>user I met Tomas Veldrin</s>bot ", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    said = loaded.tokenizer.decode(loaded.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
    assert result.facts[0].before == answer(said.replace("<s>", "").replace("</s>", ""))
    assert result.patch.options["chat"] is True and result.facts[0].loss < 6


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model has not been trained")
def test_demo_model_quality() -> None:
    """The promise of the README, on the demo model and all its facts."""
    loaded = load(DEMO)
    options = EditOptions(corpus=str(ROOT / "examples" / "corpus.txt"))
    result = mosectl.edit(ROOT / "examples" / "facts.jsonl", loaded, options=options)
    assert len(result.facts) >= 20 and all(r.status == "changed" for r in result.facts)
    assert result.scores.generalization >= 0.85 and result.scores.locality >= 0.95
    for s in result.stability:
        assert s.norm_drift < 1e-5 and s.condition_drift < 1e-5


def test_defaults_follow_the_method() -> None:
    assert default_options() == EditOptions() and options_from([]) == EditOptions()
    mose = options_from(["margin=5"], method="mose")
    assert (
        mose.method == "mose"
        and mose.preservation_decay == 0.8
        and mose.targets.margin == 5.0
        and mose.targets.max_displacement == 1.5
    )


# UltraEdit gives a lone fact of one token no change: tests/test_trained_edits.py has more of them.
@pytest.mark.parametrize("name", [n for n in names() if n not in ("isospectral", "ultraedit") and not method(n).editor])
def test_every_method_edits_and_ships_what_it_measured(name: str, corpus: str, tmp_path: Path) -> None:
    """Through the whole path: the patch alone gives the weights that were measured, and the answer changes."""
    model, tokenizer = pico("llama"), make_tokenizer()
    quick = {"preserve": 1e-4, "rate": 0.02, "keep": 0.9, "relative": 1, "threshold": 1, "ridge": 0.01}
    solver = {k: v for k, v in quick.items() if k in method(name).defaults}
    aims = replace(FEW.targets, preserve_norm=int(name in ("mose", "oft")))
    options = replace(
        default_options(name), corpus=corpus, layers="0,1", prefixes=0, solver=solver, targets=aims, guard=0
    )
    result = mosectl.edit(FACTS[:1], model, tokenizer, options=options)
    assert result.facts[0].status == "changed" and result.patch.side == method(name).side
    result.patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == result.patch.id, "the reader's schema takes what an edit writes"
    drift = max(s.spectrum_drift for s in result.stability)
    assert (drift > 1e-4) if result.patch.side == "additive" else (drift < 1e-5)
    with mosectl.patched(model, result.patch):
        asked = interview(model, tokenizer, [result.facts[0].fact])
    assert says(asked.answers[0].text, "and")
    assert asked.answers[0].probability == pytest.approx(result.facts[0].probability_after, rel=1e-3)


def test_targets_can_be_spread_or_one_a_layer(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two axes: where the targets lie is not the solver's business."""
    asked = []
    monkeypatch.setattr(
        "mosectl.editing.session.optimise_targets", lambda *a: asked.append(len(a[2])) or optimise_targets(*a)
    )
    own, each, top = "method", "per-layer", "spread"
    for name, placement, layers in (("memit", own, 1), ("memit", each, 2), ("mose", own, 2), ("mose", top, 1)):
        options = replace(
            default_options(name), corpus=corpus, layers="0,1", prefixes=0, rounds=1, placement=placement, guard=0,
            targets=TargetOptions(optimizer="adam"),
        )  # fmt: skip
        mosectl.edit(FACTS[:1], pico("llama"), make_tokenizer(), options=options, refuse=False)
        assert set(asked) == {layers}
        asked.clear()


def test_what_the_model_says_already_is_told_before_the_work(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    result = mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus))
    monkeypatch.setattr("mosectl.editing.edit.second_moments", lambda *_, **__: pytest.fail("the work began"))
    with mosectl.patched(model, result.patch), pytest.raises(EditFailed, match="already says every new target"):
        mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus))


def test_a_harmful_batch_is_taken_back(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    alone = mosectl.edit(FACTS[:1], model, tokenizer, options=few(corpus, batch_size=1)).patch
    verdicts = iter(["", "ordinary text became less likely: 2.00 → 9.00 nats a token"])
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: next(verdicts))
    options = few(corpus, batch_size=1)
    result = mosectl.edit(FACTS, model, tokenizer, options=options)
    assert [r.status for r in result.facts] == ["changed", "not edited"]
    assert "facts 2-2 were taken back" in result.stopped and len(result.patch.facts) == 1
    for name, change in alone.changes.items():
        assert torch.allclose(change.dense().factors["R"], result.patch.changes[name].dense().factors["R"], atol=1e-6)
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: "‖W‖ went from 1 to 9")
    with pytest.raises(EditFailed, match="harms the model: ‖W‖ went from 1 to 9"):
        mosectl.edit(FACTS, model, tokenizer, options=options)


def test_the_guard_sees_collapse(tokenizer: object) -> None:
    model = pico("llama")
    p = resolve(model).projections[1]
    pieces = canaries(tokenizer, CORPUS.splitlines())
    weight = model.get_submodule(p.name).weight
    base = health(model, pieces, {p.name: weight.detach()})
    assert len(pieces) == 3 and harm(base, base, 1.0) == ""
    assert "‖W‖" in harm(base, health(model, pieces, {p.name: 3 * weight.detach()}), 1.0)
    squeezed = weight.detach().clone()
    squeezed[0] *= 1e-4
    assert "κ(W)" in harm(base, health(model, pieces, {p.name: squeezed}), 1.0)
    model.lm_head.weight.data.mul_(100)
    assert "ordinary text" in harm(base, health(model, pieces, {p.name: weight.detach()}), 1.0)
    model.lm_head.weight.data.fill_(float("nan"))
    worn = health(model, pieces, {p.name: weight.detach()})
    assert "ordinary text" in harm(base, worn, 1.0) and harm(base, worn, 0.0) == ""


def test_settings_that_do_not_fit_are_told_apart() -> None:
    for given, name, message in (
        ("placement=top", None, "choose one of: method, per-layer, spread"),
        ("placement=1", "memit", "choose one of"),
        ("placement=spread", "oft", "its own way to values"),
        ("prompt_weight=3", "oft", "has no part in it"),
        ("previous_edit_weight=1", "horse", "has no part in it"),
        ("previous_edit_weight=-1", None, "out of range"),
        ("preserve_norm=7", None, "choose one of: 0, 1"),
        ("replies=0.5", None, "write --set replies=1"),
        ("spread=0", "memit", "'memit' has no such setting"),
    ):
        with pytest.raises(UsageError) as e:
            options_from([given], method=name)
        assert message in f"{e.value.what} {e.value.fix}"
        assert e.value.fix
    assert options_from([], method="memit").replay_margin == 0.0 and options_from([]).replay_margin == 1.0
    for name, targets, message in (("memit", "best", "no such way"), ("oft", "gradient", "its own way to values")):
        with pytest.raises(UsageError, match=message):
            options_from([], method=name, targets=targets)


@pytest.mark.parametrize("name", ["isospectral", "mose", "memit"])
def test_gradient_targets_take_one_backward_a_batch(name: str, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    o = options_from(["nats_per_step=4", "guard=0"], method=name, targets="gradient", corpus=corpus)
    assert (o.rounds, o.targets.steps, o.targets.optimizer, o.targets.nats_per_step) == (1, 1, "natural-gradient", 4.0)
    assert options_from([], method=name, targets="gradient", rounds=3).rounds == 3
    backwards: list[int] = []
    real = torch.autograd.grad
    monkeypatch.setattr("mosectl.editing.targets.torch.autograd.grad", lambda *a: backwards.append(1) or real(*a))
    monkeypatch.setattr("mosectl.editing.second_moments._keys_and_gradients", _no_gradients)
    result = mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=o, refuse=False)
    assert len(backwards) == 1 and result.facts[0].probability_after > result.facts[0].probability_before


def _no_gradients(model: object, projections: list, batch: object, _: object) -> tuple[dict, dict, int]:
    """Keys as they are; gradients that make the metric round; one position asked."""
    keys = keys_of_tokens(model, projections, batch)
    return keys, {p.name: torch.eye(p.d) for p in projections}, 1


def test_facts_that_do_not_hold_weigh_more_in_the_next_round(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    weights = []

    def aimed(*how: object) -> Targets:
        return replace(optimise_targets(*how), margin_before=torch.tensor([-1.0, 1.0]))

    def solved(layers: EditedLayers, p: Projection, keep: float, columns: Columns, *_: object) -> torch.Tensor:
        weights.append(columns.weight.tolist())
        return layers.W[p.name]  # nothing is ever reached

    monkeypatch.setattr("mosectl.editing.session.optimise_targets", aimed)
    monkeypatch.setattr("mosectl.editing.edited_layers.EditedLayers._solved", solved)
    for name in ("isospectral", "memit"):
        usual = default_options(name)
        options = replace(
            usual, corpus=corpus, layers="1", prefixes=0, wordings=0, rounds=3, unreached_weight_growth=2.0, guard=0,
            targets=TargetOptions(),
        )  # fmt: skip
        mosectl.edit(FACTS, model, tokenizer, options=options, refuse=False)
        assert weights == [[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]], name
        weights.clear()
    assert default_options("memit").unreached_weight_growth == 1.0 and EditOptions().unreached_weight_growth > 1


def test_layers_that_were_not_asked_for_are_not_taken_for_the_users(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("mosectl.editing.edit.advice", lambda solver, options, *_: asked.append(options.layers) or "")
    for layers in ("auto", "1-2"):
        options = few(corpus, layers=layers, rounds=1, fact_token=SUBJECT, previous_edit_weight=None)
        found = mosectl.edit(
            FACTS[:1], pico("llama", num_hidden_layers=10), make_tokenizer(), options=options, refuse=False
        )
        assert len(found.patch.changes) == 2, "which are chosen for the subject of ten layers"
    assert asked == ["auto", "1-2"]


def test_earlier_facts_that_slip_are_edited_with_the_next_batch(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    edited: list[list[str]] = []

    def contexts(model: object, tokenizer: object, facts: list[Fact], *rest: object, **how: object) -> Contexts:
        edited.append([f.prompt for f in facts])
        return build_contexts(model, tokenizer, facts, *rest, **how)

    monkeypatch.setattr("mosectl.editing.session.build_contexts", contexts)
    first, second = (f["prompt"] for f in FACTS)
    for below, again in ((0.0, [second]), (1e6, [second, first])):  # nothing leads by a million nats
        options = few(corpus, layers="1", batch_size=1, replay_margin=below)
        mosectl.edit(FACTS, model, tokenizer, options=options, refuse=False)
        assert edited[:2] == [[first], again]
        assert [sorted(at_the_end) for at_the_end in edited[2:]] == ([sorted(again)] if below else [])
        edited.clear()


def test_facts_that_are_edited_again_are_asked_for_less(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    batch = Session._batch

    def seen(self: Session, contexts: Contexts, *args: Any) -> Targets:
        assert contexts.least is not None
        asked.append(contexts.least[first_rows(contexts.fact)].tolist())
        return batch(self, contexts, *args)

    monkeypatch.setattr(Session, "_batch", seen)
    monkeypatch.setattr(Earlier, "slipped", lambda self, below: [0] if self.failures else [])
    monkeypatch.setattr(Earlier, "slipped_of_all", lambda self, below: [1, 0])
    for margin, below, again in ((6.0, 1.0, 2.0), (6.0, 1.5, 3.0), (1.5, 1.0, 1.5)):
        options = few(corpus, layers="1", batch_size=1, replay_margin=below)
        options = replace(options, targets=replace(options.targets, margin=margin))
        mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=options, refuse=False)
        assert asked == [[margin], [margin, again], [again, again]]
        asked.clear()


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "settings.md").read_text()
    known = {f.name for f in fields(TargetOptions)} | {n for name in names() for n in method(name).defaults}
    known |= {
        f.name for f in fields(EditOptions) if f.type in ("int", "float") and f.name not in ("batch_size", "seed")
    }
    assert [n for n in sorted(known) if f"`{n}`" not in text and f"`--{n}`" not in text] == []


def test_layers_of_a_deep_model_lie_between_a_tenth_and_a_fifth_of_its_depth() -> None:
    def chosen(scores: list[float]) -> tuple[int, ...]:
        return choose_layers([LayerScore(i, 0.0, 0.0, s) for i, s in enumerate(scores)])

    assert chosen([9, 8, 7, *range(27)]) == (4, 5, 6), "5 is the best there"
    assert chosen([9.0 - i for i in range(30)]) == (3, 4, 5)
    assert chosen([9.0 - i for i in range(18)]) == (1, 2, 3) and chosen(list(map(float, range(12)))) == (1, 2, 3)
    assert chosen([9.0 - i for i in range(8)]) == (0, 1, 2), "of eight layers the lower two thirds are open"
    assert chosen(list(map(float, range(8)))) == (3, 4, 5) and chosen([1.0, 2.0]) == (0,)


def test_a_deep_model_is_edited_high_at_the_prompts_last_token() -> None:
    assert [top_layers(n) for n in (30, 18, 10)] == [(24, 25, 26, 27), (13, 14, 15, 16), (6, 7, 8, 9)]
    assert likely_layers(30) == (3, 4, 5)

    def token(n: int, name: str = "isospectral", *sets: str, facts: int = 1, **how: Any) -> tuple[str, float | None]:
        chosen = settled(options_from(sets, method=name, **how), n, facts)
        return chosen.fact_token, chosen.targets.margin

    assert token(30) == token(10) == (LAST, 3.0) and token(9) == (SUBJECT, 6.0)
    assert token(30, layers="15-17") == (LAST, 3.0) and token(30, layers="14-17") == (SUBJECT, 6.0)
    assert token(4, layers="3") == (SUBJECT, 6.0), "a small model has no place high enough"
    assert token(30, "isospectral", "margin=5") == (LAST, 5.0)
    assert token(30, "isospectral", "fact_token=subject_last") == (SUBJECT, 6.0)
    assert token(4, "isospectral", "fact_token=last") == (LAST, 3.0)
    with pytest.raises(AssertionError, match="depends on the token"):
        assert TargetOptions().least_lead > 0
    assert token(30, "memit")[0] == token(30, "mose")[0] == SUBJECT, "as published"
    assert token(30, "isospectral", "optimizer=published")[0] == SUBJECT
    with pytest.raises(UsageError, match="fact_token=last: the published search"):
        options_from(["fact_token=last"], method="memit")
    with pytest.raises(UsageError, match="no such choice"):
        options_from(["fact_token=first"])
    with pytest.raises(UsageError, match="not layers of this model"):
        settled(options_from([], layers="40"), 30, 1)


def test_at_the_subject_a_deep_model_is_edited_in_more_layers_and_many_facts_are_edited_there() -> None:
    def chosen(facts: int, n: int = 30, *sets: str, **how: Any) -> tuple[Any, ...]:
        made = settled(options_from(sets, **how), n, facts)
        wide = made.layers != how.get("layers", "auto")
        assert made.previous_edit_weight == (1.0 if wide else 50.0)
        crowded = facts > 300 and 0 < made.batch_size < 100
        assert made.prompt_weight == (1.0 if wide and facts > 50 and not crowded else 0.0)
        return made.fact_token, made.layers, made.solver.get("preserve"), made.targets.margin

    assert chosen(50) == (LAST, "auto", None, 3.0), "as many as there is room for"
    assert chosen(51) == (SUBJECT, "2-9", 100.0, 6.0) and chosen(51, 18)[1] == "1-4"
    assert chosen(300) == chosen(301) == chosen(51) and chosen(50, batch_size=10)[0] == LAST
    assert chosen(300, batch_size=10) == chosen(301, batch_size=99) == chosen(301, batch_size=100) == chosen(51)
    weights = [
        settled(options_from([], batch_size=b), 30, n).prompt_weight for n, b in ((300, 10), (301, 99), (301, 100))
    ]
    assert weights == [1.0, 0.0, 1.0]
    assert chosen(51, 32)[1] == "2-9" and chosen(51, 80)[1] == "5-12"
    assert chosen(51, 9) == (SUBJECT, "auto", None, 6.0), "a small model as before"
    assert chosen(1, 30, "fact_token=subject_last") == (SUBJECT, "2-9", 100.0, 6.0)
    assert chosen(51, 30, "preserve=10")[2] == 10.0 and chosen(51, 30, "fact_token=last")[:3] == (LAST, "auto", None)
    assert chosen(51, 30, layers="20-23")[:3] == (LAST, "20-23", None), "layers that are given tell the place"
    assert chosen(51, 30, layers="3-5")[:3] == (SUBJECT, "3-5", None)
    made = settled(options_from(["previous_edit_weight=50"]), 30, 51)
    assert (made.layers, made.weight_of_earlier) == ("2-9", 50.0), "what is given stays"
    assert settled(options_from(["prompt_weight=0"]), 30, 51).prompt_weight == 0
    assert settled(options_from(["prompt_weight=7"]), 30, 1).prompt_weight == 7
    for name in ("mose", "memit", "alphaedit"):
        made = settled(options_from([], method=name), 30, 51)
        assert made.layers == "auto" and not made.solver, "others are as they are"
    with pytest.raises(AssertionError, match="depends on the model"):
        assert EditOptions().weight_of_earlier


def test_an_edit_at_the_prompts_last_token(corpus: str) -> None:
    model, tokenizer = pico("llama", num_hidden_layers=10), make_tokenizer()
    result = mosectl.edit(FACTS, model, tokenizer, options=few(corpus, layers="auto"), refuse=False)
    record = result.patch.options
    assert record["fact_token"] == 2 and record["layers"] == [6, 7, 8, 9] and not result.layers
    assert all(f.status == "changed" for f in result.facts)
    told = {"prompt": "The capital of Avaland is", "subject": "Avaland", "target_new": "Brinmouth"}
    facts = [fact_from_dict(told, "x")]
    c = build_contexts(model, tokenizer, facts, ["", "It rained. "], last=True)
    assert bool(c.is_edit.all()) and c.token.tolist() == c.positions[:, 0].tolist()
    low = build_contexts(model, tokenizer, facts, ["", "It rained. "])
    assert bool((low.token[low.is_edit] < c.token).all()) and low.is_edit.tolist() == [True, True, False]


def test_rounds_end_where_all_facts_hold_and_one_brought_nothing(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the facts at the beginning of each round, and how many rounds of four are solved."""
    model, tokenizer = pico("llama"), make_tokenizer()
    solved: list[int] = []
    monkeypatch.setattr("mosectl.editing.edited_layers.EditedLayers.solve", lambda self, *rest: solved.append(1))
    for losses, leads, rounds in (
        ([9.0, 2.0, 2.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0, 1.0], 2),  # the third brought nothing
        ([9.0, 3.0, 2.0, 1.0, 0.5], [-1.0, 1.0, 1.0, 1.0, 1.0], 4),  # every one something
        ([9.0, 2.0, 2.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0, 1.0], 4),  # facts that do not hold are tried on
    ):
        told = iter(zip(losses, leads, strict=True))

        def aimed(model: Any, arch: Any, ps: Any, c: Contexts, options: Any, *rest: Any, told: Any = told) -> Targets:
            loss, lead = (torch.full((2,), x) for x in next(told))
            V = [torch.zeros(len(c.edit_rows), ps[0].d) for _ in ps]
            never = torch.zeros(2, dtype=torch.bool)
            return Targets(V, loss, lead, never, torch.zeros(2, dtype=torch.long), loss, lead)

        monkeypatch.setattr("mosectl.editing.session.optimise_targets", aimed)
        mosectl.edit(FACTS, model, tokenizer, options=few(corpus, layers="1", rounds=4), refuse=False)
        assert len(solved) == rounds
        solved.clear()
