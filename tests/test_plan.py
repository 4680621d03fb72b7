"""What an edit will take: the model's layers timed here, statistics that are kept already, which form is sought."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

import mosectl
from mosectl.editing import pace as paces
from mosectl.editing.methods import method
from mosectl.editing.methods.base import SMALL, seeks_compact
from mosectl.editing.moments_cache import known_hash, remember_hash
from mosectl.editing.options import EditOptions, options_from
from mosectl.editing.pace import Pace, pace
from mosectl.editing.plan import _rank, estimate, patch_bytes
from mosectl.facts.records import as_facts, read_facts
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico, save
from support.paths import DEMO, ROOT

KINDS = ["llama", "gpt2", "gemma3_text", "mixtral", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_are_timed(kind: str) -> None:
    found = pace(pico(kind), "cpu", torch.float32)
    assert all(0 <= getattr(found, f.name) < 1 for f in fields(Pace))
    assert found.backward >= found.forward > 0 and found.step > 0 and found.exact > 0


def test_layers_that_would_take_minutes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paces, "LARGEST", 1000)
    monkeypatch.setattr(paces, "_shallow", lambda *_: pytest.fail("built"))
    found = pace(pico("llama"), "cpu", torch.bfloat16)
    assert found.backward == 2 * found.forward > 0 and found.head > 0


def test_a_plan_knows_kept_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text(CORPUS)
    model = save(tmp_path / "m")
    options, facts = few(str(tmp_path / "corpus.txt"), layers="0"), as_facts(FACTS, "edit")
    assert estimate(model, facts, options, device="cpu").seconds["statistics"] > 0
    mosectl.edit(FACTS, model, options=options, refuse=False)
    assert estimate(model, facts, options, device="cpu").seconds["statistics"] == 0
    other = few(str(tmp_path / "corpus.txt"), layers="1")
    assert estimate(model, facts, other, device="cpu").seconds["statistics"] > 0, "of another layer"
    weights = next(Path(model).glob("*.safetensors"))
    weights.touch()
    assert estimate(model, facts, options, device="cpu").seconds["statistics"] > 0, "the file may be another now"


def test_a_remembered_hash_that_is_none_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))
    assert known_hash(tmp_path) == ""
    for text, told in (("0" * 32, "0" * 32), ("../../../etc/passwd" + "0" * 13, ""), ("\udcff", "")):
        if told or text.isprintable():
            remember_hash(tmp_path, text)
            assert known_hash(tmp_path) == told
    (next((tmp_path / "cache" / "stats").iterdir())).write_bytes(b"\xff" * 32)
    assert known_hash(tmp_path) == ""
    monkeypatch.setenv("MOSECTL_CACHE", "/proc/nowhere")
    remember_hash(tmp_path, "0" * 32)  # nothing is lost where it cannot be kept


def test_which_form_is_sought() -> None:
    ours, theirs = method("isospectral"), method("mose")
    assert [seeks_compact(ours, form, SMALL + 1) for form in ("auto", "compact", "dense")] == [True, True, False]
    assert [seeks_compact(ours, form, SMALL) for form in ("auto", "compact", "dense")] == [False, True, False]
    assert not any(seeks_compact(theirs, form, 4096) for form in ("auto", "compact", "dense"))


def test_a_bench_edits_in_the_form_that_edit_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    from mosectl.bench import runner
    from mosectl.editing.options import default_options
    from mosectl.model.loading import Loaded

    loaded = Loaded(pico("llama"), make_tokenizer(), None)
    assert runner._solved_as_edit_does(default_options(), loaded).form == "dense", "a small model"
    monkeypatch.setattr("mosectl.editing.methods.base.SMALL", 8)
    assert runner._solved_as_edit_does(default_options(), loaded).form == "compact"
    assert runner._solved_as_edit_does(default_options("mose"), loaded).form == "dense"


@pytest.mark.parametrize(
    ("facts", "batch_size", "written"),
    [(10, 0, 0.87e6), (24, 0, 2.07e6), (24, 10, 2_177_584)],  # as runs on the demo model wrote them (docs/LOG.md)
)
def test_the_patchs_size_is_about_what_is_written(facts: int, batch_size: int, written: float) -> None:
    given = read_facts(ROOT / "examples" / "facts.jsonl", limit=facts).facts
    planned = patch_bytes(DEMO, given, options_from([], batch_size=batch_size))
    assert 1 / 1.5 < planned / written < 1.5


def test_compact_rotations_of_several_batches_add_up(tmp_path: Path) -> None:
    given, model = as_facts([FACTS[0]] * 6, "edit"), save(tmp_path / "m", hidden_size=256, intermediate_size=512)

    def planned(batch_size: int) -> int:
        return patch_bytes(model, given, options_from(["rank=10"], form="compact", batch_size=batch_size, layers="1"))

    one, three, six = (sum(4 * r * (n + r) for n in (256, 512)) for r in (10, 30, 60))
    assert (planned(0), planned(2), planned(1)) == (one, three, six)
    every = patch_bytes(model, given, options_from(["rank=200"], form="compact", batch_size=1, layers="1"))
    assert every == 4 * (256**2 + 512**2), "never more than dense"


def test_the_rank_foretold_of_a_batch_is_that_of_real_edits() -> None:
    """SmolLM2-135M: 10 to 13, 17 and 38 of one, two and ten facts; the ranks of a run's batches add up."""
    assert [_rank(n, EditOptions()) for n in (1, 2, 10)] == [10, 15, 40]
    assert _rank(10, EditOptions(solver={"rank": 4.0})) == 4
