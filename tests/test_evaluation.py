"""The whole evaluation, from Python and from the command line: sides, records, retention, thresholds, files."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import mosectl
from mosectl.checkpoints.live import patched
from mosectl.errors import BaseMismatch, BelowThreshold, PatchError, UsageError
from mosectl.measure.answers import compare, interview
from mosectl.measure.evaluate import Evaluation, evaluate_edit, to_csv
from mosectl.measure.protocols import asks
from mosectl.measure.retention import Bin
from mosectl.measure.thresholds import Threshold, check_thresholds, parse_threshold
from mosectl.model.loading import Loaded, load
from mosectl.patch.file import Patch
from mosectl.render import charts, html
from support.commands import run
from support.evaluations import FACTS, ROWS, World, record
from support.models import make_tokenizer, pico, save
from support.paths import DEMO, ROOT


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def numbers(e: Evaluation) -> list[Any]:
    return [e.metrics and [(m.protocol, m.name, m.before, m.after) for m in e.metrics], e.texts]


def test_a_patch_against_the_generation_core(world: World) -> None:
    found = world.evaluate()
    loaded = load(world.model)
    before = interview(loaded.model, loaded.tokenizer, FACTS)
    with patched(loaded.model, world.patch):
        scores = compare(FACTS, before, interview(loaded.model, loaded.tokenizer, FACTS))
    for name in ("reliability", "generalization", "locality"):
        metric = found.metric("generation", name)
        assert metric and metric.after and metric.after.value == getattr(scores, name)
    assert found.subject.kind == "patch" and found.subject.patches == (world.patch.id,)
    assert len([m for m in found.metrics if not m.group]) == 20
    assert all(m.before is None or m.before.low <= m.before.high for m in found.metrics)
    assert found.texts[0].name == "fluency" and found.texts[1].before != found.texts[1].after


def test_right_after_comes_from_the_patch(world: World) -> None:
    found = world.evaluate()
    reliability = found.metric("generation", "reliability")
    assert reliability and reliability.right_after and reliability.right_after.value == 0.5
    assert reliability.right_after.units == 2, "the third fact is not in the patch"
    assert [f.held_right_after for f in found.facts] == [True, False, None] and found.facts[0].right_after == "so"
    assert [b.right_after for b in found.retention] == [1.0, 0.0, None]
    assert any("2 of 3 facts stand in the patches" in n for n in found.notes)
    assert any("no answer for 1 locality prompt: generation and qa compare" in n for n in found.notes)
    other = replace(world.patch, facts=(replace(record(0, "changed"), target_new="else"),))
    none = world.evaluate(other, model=world.model).metric("generation", "reliability")
    assert none and none.right_after is None, "a record of another target says nothing about this one"


def test_an_edited_folder_is_the_patch_on_its_base(world: World) -> None:
    wanted = numbers(world.evaluate())
    kept, bare = world.folder / "kept", world.folder / "bare"
    mosectl.apply([world.patch], world.model, kept)
    mosectl.apply([world.patch], world.model, bare, keep_base=False)
    for what, options in ((kept, {}), (bare, {}), (bare, {"base": world.model})):
        found = world.evaluate(what, **options)
        assert numbers(found) == wanted and found.subject.kind == "edited model" and found.subject.base
        assert found.retention[0].right_after == 1.0, "the folder carries its patches' records"
    world.model.rename(world.folder / "gone")
    assert numbers(world.evaluate(kept)) == wanted, "the kept base tensors are enough"
    alone = world.evaluate(bare)
    assert alone.subject.base is None and all(m.before is None for m in alone.metrics)
    assert "no model from before the edit" in alone.notes[0]
    assert "no answer for 1 locality prompt: without the unedited model (--base) there is nothing" in alone.notes[1]
    local = alone.metric("generation", "locality")
    assert local and local.asked == 1, "only prompts with a known answer"
    other = save(world.folder / "other", rms_norm_eps=1e-3)
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(other)
    with pytest.raises(BaseMismatch, match="not the base this model was edited from"):
        world.evaluate(kept, base=other)
    assert world.evaluate(kept, base=other, force=True).subject.base == str(other)


def test_a_plain_model_and_models_in_memory(world: World) -> None:
    plain = world.evaluate(world.model)
    assert plain.subject.kind == "model" and plain.subject.base is None and plain.metrics[0].right_after is None
    loaded = Loaded(pico("llama"), make_tokenizer(), None)
    weights = {n: p.clone() for n, p in loaded.model.named_parameters()}
    found = world.evaluate(world.patch, model=loaded, protocols=["memit"], batch_size=1)
    assert {m.protocol for m in found.metrics} == {"memit"} and set(found.facts[0].shares) == {
        f"memit.{m}" for m in ("reliability", "generalization", "locality", "portability")
    }
    assert all(torch.equal(p, weights[n]) for n, p in loaded.model.named_parameters()), "the model is as it was"
    assert "without ground_truth" in " ".join(found.notes)


def test_thresholds(world: World) -> None:
    every = ("generation", "qa", "easyedit", "memit", "zsre")
    assert parse_threshold("locality=0.9", every) == Threshold("generation", "locality", 0.9)
    assert parse_threshold("memit.locality=1", every) == Threshold("memit", "locality", 1.0)
    for bad in ("locality", "speed=1", "locality=2", "locality=x", "x.locality=1", "zsre.=1", "locality=nan", "=1"):
        with pytest.raises(UsageError, match="--fail-under"):
            parse_threshold(bad, every)
    with pytest.raises(UsageError, match="'memit' is not measured"):
        parse_threshold("memit.locality=1", ("generation",))
    found = world.evaluate()
    check_thresholds(found, [Threshold("generation", "reliability", 0.0)])
    asked = {(m.protocol, m.name) for m in found.metrics if m.after and not m.group}
    assert asked == {(p, m) for p in every for fact in FACTS for m in asks(p, fact)}, "known from the facts alone"
    none = replace(found, metrics=tuple(replace(m, after=None) for m in found.metrics))
    with pytest.raises(BelowThreshold, match="was not measured") as e:
        check_thresholds(none, [Threshold("generation", "reliability", 0.0)])
    assert e.value.exit_code == 10, "what was not measured must not pass"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_and_escapes_everything(world: World) -> None:
    found = world.evaluate()
    evil = '"><img src=x onerror=alert(1)>'
    found = replace(found, subject=replace(found.subject, name=evil, base=evil, in_order=True), notes=(evil,))
    text = html.render(found)
    page = Page()
    page.feed(text)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not {"img", "link", "iframe"} & set(page.tags) and page.tags.count("svg") == 2
    assert page.tags.count("script") == 1 and "default-src &#39;none&#39;" in text
    assert not re.search(r"https?:|url\(|@import", text), "nothing is fetched"
    assert not [name for name, _ in page.attributes if name in ("src", "href", "onerror")]
    assert all(f.prompt in page.text for f in FACTS) and "a & b; =1+1" in page.text
    assert "prefers-color-scheme: dark" in text and "arXiv 2502.11177" in text


def test_csv_comes_back(world: World) -> None:
    found = world.evaluate()
    rows = list(csv.DictReader(to_csv(found).decode().splitlines(keepends=True)))
    assert [(r["prompt"], r["subject"], r["target_new"]) for r in rows] == [
        (f.prompt, f.subject, f.target_new) for f in FACTS
    ]
    for row, fact in zip(rows, found.facts, strict=True):
        assert row["after"] == fact.after and row["before"] == fact.before
        assert {n: float(row[n]) if row[n] else None for n in fact.shares} == fact.shares
        assert float(row["probability_after"]) == fact.probability_after


def test_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    table, page = world.folder / "out" / "t.csv", world.folder / "t.html"
    assert run(*world.cli("--csv", table, "--html", page, "--json", "--fail-under", "reliability=0")) == 0
    found = json.loads(capsys.readouterr().out)
    assert {m["protocol"] for m in found["metrics"]} == {"generation", "qa", "easyedit", "memit", "zsre"}
    assert found["settings"]["seed"] == 0 and found["facts"][0]["prompt"] == FACTS[0].prompt
    assert table.read_text().count("\n") == 4 and page.read_text().startswith("<!doctype html>")
    old = page.read_bytes()
    assert run(*world.cli("--html", page)) == 7
    assert "--overwrite" in capsys.readouterr().err and page.read_bytes() == old
    assert run(*world.cli("--html", page, "--overwrite", "--protocol", "zsre", "--limit", 1)) == 0
    shown = capsys.readouterr().out
    assert "zsre\treliability" in shown and "generation\treliability" not in shown and page.read_bytes() != old


def test_what_was_not_asked_has_no_row(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.facts.write_text(json.dumps(ROWS[1]))
    assert run(*world.cli()) == 0
    rows = re.findall(r"^(generation|qa|easyedit|memit|zsre)\t(\S.*?)\t(.*)$", capsys.readouterr().out, re.M)
    assert {"reliability"} <= {name for _, name, _ in rows} <= {"reliability", "locality"}
    assert not any(set(numbers) <= set("–\t0") for _, _, numbers in rows)


def test_below_a_threshold_is_exit_code_10(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    page = world.folder / "t.html"
    assert run(*world.cli("--fail-under", "reliability=1", "--fail-under", "zsre.locality=0", "--html", page)) == 10
    shown = capsys.readouterr()
    assert "generation.reliability is" in shown.err and "below 1" in shown.err and "zsre" not in shown.err
    assert "generation\treliability" in shown.out and page.exists(), "the report is there all the same"


def test_a_threshold_without_prompts_is_told_before_the_model_is_loaded(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = ("eval", world.folder / "gone", world.facts)
    bounds = ("--fail-under", "portability=0", "--fail-under", "memit.portability=0", "--fail-under", "locality=0")
    assert run(*gone, *bounds, "--limit", 1) == 10
    shown = capsys.readouterr()
    assert "memit.portability was not measured" in shown.err and "generation" not in shown.err and shown.out == ""
    world.facts.write_text(json.dumps(ROWS[1]))
    assert run(*gone, *bounds) == 10
    assert "generation.portability was not measured" in capsys.readouterr().err
    assert run(*gone, "--fail-under", "reliability=1") == 4, "what the facts do ask for needs the model"


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown protocol": (("eval", "{p}", "{f}", "--protocol", "magic"), 2, "choose from generation"),
    "unknown metric": (("eval", "{p}", "{f}", "--fail-under", "speed=1"), 2, "no such metric"),
    "metric not measured": (("eval", "{p}", "{f}", "--protocol", "zsre", "--fail-under", "locality=1"), 2, "not measured"),
    "not a share": (("eval", "{p}", "{f}", "--fail-under", "locality=95"), 2, "from 0 to 1"),
    "patch of an unknown folder": (("eval", "{p}", "{f}"), 2, "say where by --model"),
    "missing patch": (("eval", "{d}/no.safetensors", "{f}"), 5, "no such file"),
    "missing model": (("eval", "{d}/no", "{f}"), 4, "no such model folder"),
    "wrong base": (("eval", "{p}", "{f}", "-m", "{d}/wide"), 6, "shape"),
    "--model with a model": (("eval", "{m}", "{f}", "-m", "{m}"), 2, "--base"),
    "--base with a patch": (("eval", "{p}", "{f}", "--base", "{m}"), 2, "--model"),
    "no text": (("eval", "{p}", "{f}", "-m", "{m}", "--text", "/nowhere"), 2, "cannot read the corpus"),
    "no facts": (("eval", "{p}", "{d}/none"), 3, "no such file"),
    "one file for two": (("eval", "{p}", "{f}", "--csv", "{d}/x", "--html", "{d}/x"), 2, "the same file"),
    "existing output": (("eval", "{p}", "{f}", "--csv", "{f}"), 7, "choose another --csv"),
    "a folder as output": (("eval", "{p}", "{f}", "--html", "{m}"), 7, "after --html"),
    "chat without a template": (("eval", "{m}", "{f}", "--chat"), 2, "no chat template"),
    "no matplotlib": (("eval", "{p}", "{f}", "--png", "{d}/x.png"), 2, 'pip install "mosectl[plot]"'),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(
    kind: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, code, message = BAD[kind]
    save(world.folder / "wide", hidden_size=64, head_dim=16)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    names = {"p": world.file, "f": world.facts, "m": world.model, "d": world.folder}
    before = sorted(world.folder.rglob("*"))
    assert run(*(a.format(**names) for a in args)) == code
    shown = capsys.readouterr()
    assert message in shown.err and "→" in shown.err and shown.out == "" and "Traceback" not in shown.err, shown.err
    assert sorted(world.folder.rglob("*")) == before


def test_the_curve_names_its_protocol_and_the_number_of_facts() -> None:
    axes = Mock()
    charts._draw_retention(axes, [Bin(1, 2, None, 0.5), Bin(3, 3, 1.0, 1.0)])
    assert "the 3 facts" in axes.set_xlabel.call_args[0][0] and "generation" in axes.set_ylabel.call_args[0][0]


def test_png(world: World) -> None:
    pytest.importorskip("matplotlib")
    assert charts.png(world.evaluate()).startswith(b"\x89PNG")


def test_patches_from_python_name_their_errors(world: World) -> None:
    with pytest.raises(PatchError, match="no such file"):
        mosectl.evaluate_edit(world.folder / "no.safetensors", FACTS)
    with pytest.raises(UsageError, match="no fact to evaluate"):
        mosectl.evaluate_edit(world.file, [], model=world.model)


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model has not been trained")
def test_the_demo_patch_still_holds() -> None:
    patch = Patch.load(ROOT / "patches" / "demo.safetensors")
    found = evaluate_edit(patch, ROOT / "examples" / "facts.jsonl", model=DEMO, protocols=["generation"])
    check_thresholds(found, [parse_threshold(f"{m}=0.85", ("generation",)) for m in ("reliability", "generalization")])
    for name in ("reliability", "generalization", "locality"):
        metric = found.metric("generation", name)
        assert metric and metric.after
        assert metric.after.value == pytest.approx(patch.metrics["scores"][name], abs=1e-6), (
            "as measured when it was made"
        )


def test_a_model_that_a_patch_names_is_told_and_not_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --model: the patch is a stranger's, and a download is done with the user's token."""
    import huggingface_hub

    asked: list[bool] = []
    fetch = huggingface_hub.snapshot_download

    def download(*where: Any, local_files_only: bool = False, **more: Any) -> str:
        asked.append(local_files_only)
        return fetch(*where, local_files_only=True, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    replace(world.patch, model="me/model", revision="a" * 40).save(world.file)
    assert run("eval", world.file, world.facts) == 2
    assert "--model me/model fetches it" in capsys.readouterr().err and asked and all(asked)
    commit = world.folder / "hub" / "models--me--model" / "snapshots" / ("a" * 40)
    commit.parent.mkdir(parents=True)
    world.model.rename(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.folder / "hub"))
    assert world.evaluate(world.file).subject.base == "me/model without the patch", "what is in the cache is at hand"
    assert all(asked)
