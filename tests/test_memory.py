"""Batches that fit in memory, and what is done when they do not after all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mosectl.editing import second_moments as stats
from mosectl.editing import targets
from mosectl.editing.contexts import build_contexts
from mosectl.editing.options import default_options
from mosectl.editing.plan import estimate
from mosectl.editing.second_moments import second_moments
from mosectl.editing.targets import TargetOptions, optimise_targets
from mosectl.facts.corpus import Corpus
from mosectl.facts.records import as_facts
from mosectl.model import memory
from mosectl.model.architecture import resolve
from mosectl.model.memory import FREE, LEAST, MOST, SHARE, fitting, free_bytes, halving, token_bytes, work_bytes
from support.facts import FACTS
from support.models import make_tokenizer, pico

FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")


def test_parts_are_halved_where_memory_runs_out_and_nothing_is_done_twice() -> None:
    asked: list[tuple[int, int]] = []

    def work(start: int, end: int) -> list[int]:
        asked.append((start, end))
        if end - start > 3:
            raise FULL
        return list(range(start, end))

    parts = list(halving(13, 8, work))
    assert [start for start, _ in parts] == [0, 2, 4, 6, 8, 10, 12]
    assert [x for _, part in parts for x in part] == list(range(13))
    assert asked[:3] == [(0, 8), (0, 4), (0, 2)], "halved, from the same place on"


def test_parts_stop_where_one_does_not_fit_and_at_other_errors() -> None:
    def never(start: int, end: int) -> None:
        raise FULL

    with pytest.raises(RuntimeError, match="can't allocate"):
        list(halving(4, 4, never))

    def wrong(start: int, end: int) -> None:
        asked.append(end)
        raise RuntimeError("shapes do not match")

    asked: list[int] = []
    with pytest.raises(RuntimeError, match="shapes"):
        list(halving(4, 4, wrong))
    assert asked == [4]


def test_work_is_bounded_by_the_weights_and_by_what_is_free() -> None:
    assert work_bytes(0) == LEAST and work_bytes(16_000_000_000) == SHARE * 16e9
    assert work_bytes(16_000_000_000, free=1e9) == FREE * 1e9 and work_bytes(10**12) == MOST
    assert free_bytes(torch.device("cpu")) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_backward_pass_keeps_is_foreseen(kind: str) -> None:
    """Against what autograd saves, weights not counted."""
    model = pico(kind, hidden_size=64, intermediate_size=256) if kind == "llama" else pico(kind, n_embd=64, n_inner=256)
    for p in model.parameters():
        p.requires_grad_(False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(3, 20, (4, 16))
    first = torch.zeros(4, 16, 64, requires_grad=True)
    arch = resolve(model)
    hook = model.get_submodule(f"{arch.layers_path}.0").register_forward_pre_hook(lambda _, a: (a[0] + first, *a[1:]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    assert kept.requires_grad
    p = arch.projections[0]
    foreseen = len(arch.projections) * ids.numel() * token_bytes(p.d, p.p, 4)
    assert 0.6 < foreseen / sum(saved.values()) < 1.6


def test_fewer_sequences_where_less_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("llama")
    arch = resolve(model)
    whole = fitting(model, arch, 1, tokens=10, positions=3)
    assert fitting(model, arch, 1, tokens=20, positions=6) in (whole // 2, whole // 2 + 1)
    assert fitting(model, arch, 0, tokens=10, positions=3) < whole
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    assert fitting(model, arch, 1, tokens=10, positions=3) == 1


def test_targets_are_the_same_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    arch = resolve(model)
    facts = as_facts(FACTS, "edit")
    contexts = build_contexts(model, tokenizer, facts, [""])
    options = TargetOptions(steps=3, optimizer="adam", margin=6.0)
    wanted = optimise_targets(model, arch, arch.projections[:2], contexts, options)
    sizes: list[int] = []
    real = targets._Optimiser

    def tight(model: Any, arch: Any, projections: Any, part: Any, *more: Any) -> Any:
        sizes.append(int(part.fact.max()) + 1)
        if sizes[-1] > 1:
            raise FULL
        return real(model, arch, projections, part, *more)

    monkeypatch.setattr(targets, "_Optimiser", tight)
    seen: list[tuple[int, int]] = []
    found = optimise_targets(model, arch, arch.projections[:2], contexts, options, lambda *x: seen.append(x))
    assert sizes[0] == len(facts) and sizes[-len(facts) :] == [1] * len(facts)
    assert torch.allclose(found.loss, wanted.loss, atol=1e-4)
    for a, b in zip(found.V, wanted.V, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * float(b.abs().max()))
    assert seen == sorted(seen) and seen[-1][0] <= len(facts)


def test_gradients_of_statistics_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest label instead of a drawn one: draws depend on the parts, what they are drawn from does not."""
    monkeypatch.setattr(
        "mosectl.editing.second_moments.torch.multinomial", lambda p, *_, **__: p.argmax(-1, keepdim=True)
    )
    model, tokenizer = pico("llama"), make_tokenizer()
    corpus = Corpus("x", tuple(f"the town of number {i} is near" for i in range(12)))
    asked: Any = (model, tokenizer, resolve(model).projections[:2], corpus)
    whole = second_moments(*asked, cache=False)
    monkeypatch.setattr(stats, "fitting", lambda *_: 2)
    parts = second_moments(*asked, cache=False)
    for name in whole.C:
        assert torch.allclose(parts.C[name], whole.C[name], rtol=1e-4, atol=1e-6)
        assert torch.allclose(parts.G[name], whole.G[name], rtol=1e-3, atol=1e-5 * float(whole.G[name].abs().max()))


def test_the_plan_counts_the_host_on_a_cpu_only(tmp_path: Path) -> None:
    """Layers so wide that what waits for the solve is most of it: C (p, p) float32 and two (d, p) float64 a layer."""
    model = pico("llama", intermediate_size=16384)
    model.save_pretrained(tmp_path)
    facts, options = as_facts(FACTS[:1], "edit"), replace(default_options(), layers="0-2", form="dense")
    cpu, gpu = (estimate(tmp_path, facts, options, device="cpu", host=host).peak_bytes for host in (True, False))
    d, p = 32, 16384
    assert cpu - gpu >= 3 * (4 * p * p + 8 * d * p)
