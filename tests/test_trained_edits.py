"""Edits by LocFT-BF, UltraEdit and CrispEdit as a user makes them: models of all kinds, batches, resume, guard, plan."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing.methods import method
from mosectl.editing.methods.base import ModelProblem
from mosectl.editing.methods.crispedit import CrispEdit
from mosectl.editing.options import EditOptions, default_options, options_from
from mosectl.editing.plan import estimate
from mosectl.editing.resume import KIND, RECORD, Progress
from mosectl.editing.session import Session
from mosectl.errors import EditFailed, OutputError, UsageError
from mosectl.facts.records import as_facts
from mosectl.measure.answers import interview
from mosectl.storage.state_file import read_state, write_state
from support.facts import CORPUS, FACTS
from support.models import pico, save
from support.training import ALL, TOKENIZER

NAMES = ("ft", "ultraedit", "crispedit")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return str(tmp_path / "corpus.txt")


def strong(name: str, corpus: str, **changes: Any) -> EditOptions:
    """Rates for models of random weights."""
    rate = {"ft": 0.02, "crispedit": 0.02, "ultraedit": 0.05}[name]
    return replace(default_options(name), corpus=corpus, **{"guard": 0.0, "solver": {"rate": rate}, **changes})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind,dtype,over",
    [("llama", torch.float32, {"tie_word_embeddings": True}), ("gpt2", torch.float32, {}), ("qwen2", torch.bfloat16, {}),
     ("opt", torch.float32, {})],
)  # fmt: skip
def test_an_edit(name: str, kind: str, dtype: torch.dtype, over: dict[str, Any], corpus: str, tmp_path: Path) -> None:
    model = pico(kind, **over).to(dtype)
    before = deepcopy(model.state_dict())
    result = mosectl.edit(ALL, model, TOKENIZER, options=strong(name, corpus, layers="1,2"), refuse=False)
    # asked with the patch's own factors on the model
    assert sum(f.probability_after > f.probability_before for f in result.facts) >= 4
    assert result.patch.side == "additive" and all(s.norm_drift > 0 for s in result.stability)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items()), "the model is as it was"
    assert (result.corpus_tokens > 0) == (name == "crispedit")
    result.patch.save(tmp_path / "p")
    assert mosectl.Patch.load(tmp_path / "p").id == result.patch.id, "the reader's schema takes what an edit writes"
    with mosectl.patched(model, result.patch):
        asked = interview(model, TOKENIZER, [f.fact for f in result.facts])
    expected = [f.probability_after for f in result.facts]
    assert [a.probability for a in asked.answers] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_edit_comes_to_the_same_patch(
    name: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = save(tmp_path / "m"), Progress(tmp_path / "p.progress", resume=True)
    how = strong(name, corpus, batch_size=2, layers="1,2")
    whole = mosectl.edit(ALL, folder, options=how, refuse=False)
    assert len(whole.curve) == 4
    real = Session._batch

    def interrupted(run: Session, contexts: Any, clock: Any, first: int, *rest: int) -> Any:
        if first == 4:
            raise KeyboardInterrupt
        return real(run, contexts, clock, first, *rest)

    with monkeypatch.context() as m:
        m.setattr(Session, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mosectl.edit(ALL, folder, options=how, progress=kept, refuse=False)
    bytes_kept = kept.path.read_bytes()
    again = mosectl.edit(ALL, folder, options=how, progress=kept, refuse=False)
    assert again.patch.id == whole.patch.id
    if name == "ft":
        return
    kept.path.write_bytes(bytes_kept)
    record, tensors = read_state(kept.path, KIND, RECORD, "", 10**9)
    at = next(n for n in tensors if n.startswith("carried.mean"))
    for changed in ({**tensors, at: tensors[at][:-1]}, {n: x for n, x in tensors.items() if n != at}):
        write_state(kept.path, KIND, record, changed)
        with pytest.raises(OutputError, match="tensors of other shapes"):
            mosectl.edit(ALL, folder, options=how, progress=kept, refuse=False)


def test_a_method_sees_what_went_before(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], CrispEdit.fit

    def fit(self: Any, given: ModelProblem) -> Any:
        earlier = 0 if given.earlier is None else int(given.earlier.fact.max()) + 1
        assert given.moments is not None and given.moments.tokens > 0 and given.seed == 7 and given.ending == 2
        seen.append((earlier, len(given.carried) > 0))
        return real(self, given)

    monkeypatch.setattr(CrispEdit, "fit", fit)
    told: list[int] = []

    def on_step(phase: str, done: int, total: int) -> None:
        if phase == "solve" and total == len(ALL):
            told.append(done)

    how = strong("crispedit", corpus, batch_size=2, layers="1", seed=7)
    mosectl.edit(ALL, pico("llama"), TOKENIZER, options=how, refuse=False, on_step=on_step)
    assert seen == [(0, False), (2, True), (4, True)]
    assert told == sorted(told) and {0, 1, 2, 3, 4, 5} >= {*told} > {5}, "epochs are told, in facts"


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_kept_whatever_it_brings(name: str, corpus: str) -> None:
    """As published: no round is compared with doing nothing. A negative rate climbs."""
    how = strong(name, corpus, solver={"rate": -0.01}, layers="1")
    result = mosectl.edit(ALL, pico("llama"), TOKENIZER, options=how, refuse=False)
    assert all(f.probability_after < f.probability_before for f in result.facts)
    assert all(s.norm_drift > 1e-5 for s in result.stability)


@pytest.mark.parametrize("name", NAMES)
def test_the_guard_takes_a_harmful_batch_back(name: str, corpus: str) -> None:
    how = strong(name, corpus, guard=0.5, solver={"rate": 50.0}, layers="1,2")
    with pytest.raises(EditFailed, match=r"harms the model|not finite") as e:
        mosectl.edit(ALL, pico("llama"), TOKENIZER, options=how, refuse=False)
    assert "rate" in str(e.value.fix)


def test_the_settings_are_those_of_their_own_code(corpus: str) -> None:
    """github.com/ICT-STAR/LocFT, XiaojieGu/UltraEdit, zarifikram/CrispEdit: hparams and run scripts."""
    assert method("ft").defaults == {"rate": 5e-4, "epochs": 25, "minibatch": 100, "end": 1}
    assert method("ultraedit").defaults == {"rate": 1e-6, "ridge": 1, "minibatch": 10}
    assert method("crispedit").defaults == {
        "rate": 5e-4, "epochs": 25, "minibatch": 32, "end": 0, "energy": 0.9, "earlier_facts": 1000,
    }  # fmt: skip
    for name, kind, n, expected in (
        ("ft", "llama", 32, (22,)), ("ft", "mistral", 32, (23,)), ("ft", "qwen2", 28, (6,)), ("ft", "qwen3", 36, (24,)),
        ("ultraedit", "mistral", 32, (29, 30)), ("ultraedit", "gptj", 28, (*range(18, 27),)),
        ("ultraedit", "phi3", 40, (*range(30, 39),)), ("crispedit", "llama", 32, (19, 20, 21, 22, 23)),
        ("crispedit", "qwen2", 28, (15, 16, 17, 18, 19)),
    ):  # fmt: skip
        assert method(name).published.edited(kind, n) == expected
    for name in NAMES:
        o = default_options(name)
        assert o.published and (o.rounds, o.prefixes, o.wordings, o.previous_edit_weight) == (1, 0, 0, 0)
        with pytest.raises(UsageError, match="own way to values"):
            options_from(["optimizer=adam"], method=name)


def test_a_turn_of_ultraedit_is_a_hundred_facts(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Session._batch

    def batch(run: Session, contexts: Any, clock: Any, first: int, n: int, total: int) -> Any:
        sizes.append(n)
        return real(run, contexts, clock, first, n, total)

    monkeypatch.setattr(Session, "_batch", batch)
    many = [{**ALL[i % 5], "prompt": f"{i} {ALL[i % 5]['prompt']}"} for i in range(102)]
    mosectl.edit(many, pico("llama"), TOKENIZER, options=strong("ultraedit", corpus), refuse=False)
    assert sizes == [100, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan(name: str, corpus: str, tmp_path: Path) -> None:
    planned = estimate(save(tmp_path / "m"), as_facts(ALL, "edit"), strong(name, corpus), device="cpu")
    assert not planned.auto and planned.peak_bytes > planned.model_bytes
    assert ("statistics" in planned.seconds) == (name == "crispedit") and planned.seconds["solve"] > 0
    rank = 32 if name != "ultraedit" else method(name).columns(as_facts(ALL, "edit"))
    assert planned.patch_bytes == 4 * rank * (32 + 48) * len(planned.layers)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_of_experts_is_refused(name: str, corpus: str) -> None:
    with pytest.raises(UsageError, match="a mixture of experts has many"):
        mosectl.edit(FACTS, pico("mixtral"), TOKENIZER, options=strong(name, corpus, layers="1"), refuse=False)
