"""What every command says, against golden files: `--json`, records, cards, tables, HTML and help."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from mosectl.cli.app import app
from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from support.commands import run
from support.golden import check, check_json, text
from support.paths import DEMO, ROOT

FACTS = ROOT / "examples" / "facts.jsonl"
PATCH = ROOT / "patches" / "demo.safetensors"
SEARCHED = 0.5  # an optimiser on another machine ends a little elsewhere


class Desk:
    """A folder, and commands run in it whose standard output is held against a golden file."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.places = {str(folder): "TMP", str(ROOT): "ROOT"}

    def run(self, *args: object, code: int = 0) -> str:
        self.capsys.readouterr()
        assert run(*args) == code, self.capsys.readouterr().err
        return self.capsys.readouterr().out

    def json(self, name: str, *args: object, code: int = 0, within: float = 0.05) -> None:
        check_json(f"{name}.json", self.run(*args, "--json", code=code), self.places, within)

    def text(self, name: str, *args: object, code: int = 0) -> None:
        check(name, text(self.run(*args, code=code), self.places))


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(DEMO, tmp_path / "model")
    return Desk(tmp_path, capsys)


def test_help(desk: Desk) -> None:
    """Every command with all its options, as data: how wide a terminal is makes no difference."""
    lines = []
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        lines.append(f"{name}: {command.help}")
        for p in command.params:
            lines.append(f"  {' '.join(p.opts)} = {p.default!r}: {getattr(p, 'help', '')}")
    check("help.txt", text("\n".join(lines), desk.places) + "\n")


def test_facts_and_model(desk: Desk) -> None:
    desk.json("check", "check", FACTS, "--limit", 2)
    desk.json("check-tokens", "check", FACTS, "--limit", 2, "--model", DEMO)
    desk.text("check.txt", "check", FACTS, "--limit", 2)
    desk.json("doctor", "doctor", DEMO)
    desk.text("doctor.txt", "doctor", DEMO)
    desk.json("dry-run", "edit", FACTS, "--model", DEMO, "--layers", "2-4", "--dry-run", "--dtype", "float32")
    desk.json("ask", "ask", "The capital of Quenmark is", "--model", DEMO, "--dtype", "float32")


def test_a_patch_made_before_keeps_its_bytes_and_id(tmp_path: Path) -> None:
    patch = Patch.load(PATCH)
    patch.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == PATCH.read_bytes()
    assert (
        hashlib.sha256(PATCH.read_bytes()).hexdigest()
        == (ROOT / "tests" / "goldens" / "demo.sha256").read_text().strip()
    )


def test_a_record_and_its_id(desk: Desk) -> None:
    desk.json("inspect", "inspect", PATCH)
    desk.text("inspect.txt", "inspect", PATCH)
    desk.json("inspect-model", "inspect", PATCH, "--model", DEMO)
    desk.json("push", "push", PATCH, "user/repo", "--dry-run")
    desk.text("card.md", "push", PATCH, "user/repo", "--dry-run")


def second(folder: Path) -> Path:
    """A patch of one exact rotation on the demo model, beside the one that is stored."""
    first = Patch.load(PATCH)
    module = "model.layers.4.mlp.down_proj"
    turned = torch.eye(first.base[module].shape[0])
    turned[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    path = folder / "second.safetensors"
    only = {"changes": {module: Change({"R": turned})}, "base": {module: first.base[module]}}
    replace(first, **only, method="mose", side="output", facts=first.facts[:1]).save(path)  # type: ignore[arg-type]
    return path


def test_patches_on_a_model(desk: Desk) -> None:
    edited = desk.folder / "edited"
    other = second(desk.folder)
    model = desk.folder / "model"
    desk.json("apply", "apply", PATCH, "--model", model, "-o", edited)
    desk.json("apply-second", "apply", other, "--model", edited, "-o", desk.folder / "both", "--force")
    journal = json.loads((edited / "mosectl.json").read_text())
    check_json("journal.json", json.dumps(journal), desk.places)
    desk.json("log", "log", edited)
    desk.text("log.txt", "log", desk.folder / "both")
    desk.json("verify", "verify", edited)
    desk.json("blame", "blame", "The capital of Quenmark is", edited)
    desk.json("diff", "diff", PATCH, other)
    desk.json("merge", "merge", PATCH, other, "-o", desk.folder / "merged.safetensors")
    desk.json("export-lora", "export", PATCH, "--model", model, "--to", "lora", "-o", desk.folder / "lora")
    desk.json("export-merged", "export", PATCH, "--model", model, "--to", "merged", "-o", desk.folder / "whole")
    desk.json("revert", "revert", PATCH, "--model", edited)


def test_edit(desk: Desk) -> None:
    out = desk.folder / "p.safetensors"
    how = ["--layers", "2-4", "--limit", 2, "--set", "wordings=0", "--dtype", "float32"]
    found = json.loads(desk.run("edit", FACTS, "--model", DEMO, "-o", out, *how, "--json"))
    for probe in (
        p for p in found["probes"] if p["own"]
    ):  # what happens there is nobody's aim: it may differ elsewhere
        probe |= dict.fromkeys(("after", "generation", "qa", "change"), "<not aimed at>")
    check_json("edit.json", json.dumps(found), desk.places, SEARCHED)
    desk.json("edit-record", "inspect", out, within=SEARCHED)


def test_measurements(desk: Desk) -> None:
    page, csv = desk.folder / "report.html", desk.folder / "scores.csv"
    how = ["--dtype", "float32", "--limit", 2, "--text", ROOT / "examples" / "corpus.txt", "--html", page, "--csv", csv]
    desk.json("eval", "eval", PATCH, FACTS, "--model", DEMO, *how)
    whole = page.read_text()  # what its style and its script are, the browser tests look at
    drawn = re.sub(r"(<(?:style|script)>).*?(?=</)|sha256-[\w+/=]+", r"\1", whole, flags=re.DOTALL)
    check("eval.html", text(drawn, desk.places))
    check("eval.csv", text(csv.read_text(), desk.places))
    desk.text("eval.txt", "eval", PATCH, FACTS, "--model", DEMO, "--limit", 1, "--dtype", "float32")


def test_bench(desk: Desk) -> None:
    config = desk.folder / "bench.yaml"
    config.write_text(f"""
models: [{DEMO}]
datasets: [{{name: demo, facts: {FACTS}}}]
corpus: {ROOT / "examples" / "corpus.txt"}
runs: [{{edits: 2, batch_size: 2}}]
layers: 2-4
methods: [{{name: mose, set: [wordings=0]}}, {{name: memit, set: [preserve=10]}}]
""")
    results = desk.folder / "results"
    desk.json("bench", "bench", config, "-o", results, "--dtype", "float32", within=SEARCHED)
    tables = re.sub(
        r"\| [\d.]+ \| [\d.]+ \|  \|$", "| <seconds> | <edits/s> |  |", (results / "tables.md").read_text(), flags=re.M
    )
    check("bench-tables.md", text(tables, desk.places), SEARCHED)
    first = (results / "results.jsonl").read_text().splitlines()[0]
    check_json("bench-result.json", first, desk.places, SEARCHED)


def test_preparation(desk: Desk) -> None:
    desk.json("stats", "stats", "--model", DEMO, "--layers", "2", "--corpus", ROOT / "examples" / "corpus.txt")
    own = desk.folder / "own.txt"
    desk.run("sample", "--model", DEMO, "-o", own, "--samples", 2, "--tokens", 8)
    check("sample.txt", own.read_text())
