"""benchmarks/train_factlm.py at its smallest: what it writes can be used, and what it is given wrong is told."""

from __future__ import annotations

import importlib
import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosectl.bench.config import cells, read_bench
from mosectl.facts.records import read_facts
from support.paths import ROOT

TOWNS = ("Brinmouth", "Dorhaven", "Kelwick", "Marford")
SMALL = (
    *("--preset", "tiny", "--device", "cpu", "--layers", "2", "--hidden", "64", "--ffn", "128", "--heads", "2"),
    *("--kv-heads", "1", "--vocab", "420", "--batch-tokens", "512", "--warmup", "10", "--measure-every", "25"),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("train_factlm")


def fact(i: int) -> dict[str, str]:
    """One of 16, in EasyEdit's fields; the new target never stands anywhere else."""
    name, town = f"Person{i:02}", TOWNS[i % len(TOWNS)]
    return {
        "prompt": f"{name} was born in", "subject": name, "target_new": "Zanzibar", "ground_truth": town,
        "rephrase_prompt": f"The home of {name} is", "locality_prompt": f"Cousin{i:02} was born in",
        "locality_ground_truth": town,
    }  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("factlm")
    facts, text = folder / "facts.jsonl", folder / "text.txt"
    facts.write_text("".join(json.dumps(fact(i)) + "\n" for i in range(16)))
    text.write_text("The rain was heavy and the streets were empty.\nA warm wind blew over the town.\n" * 20)
    return facts, text


@pytest.fixture(scope="module")
def trained(script: ModuleType, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    given = ["--facts", inputs[0], "--text", inputs[1], "-o", out, *SMALL, "--minutes", "0.3", "--lr", "5e-3"]
    assert script.main(list(map(str, given))) == 0
    return out


def test_it_learns_and_stops(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert record["history"][-1]["loss"] < 0.7 * record["history"][0]["loss"]
    assert record["ended"] == "known" and record["measured"]["known"] >= 0.9
    assert record["measured"]["new_target"] > 0 and record["tokens_per_second"] > 0
    assert record["options"]["label_smoothing"] == 0.1 and record["seed"] == 0


def test_what_it_writes_can_be_used(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "Person03 was born in Märford, 1873."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2

    rows = [json.loads(line) for line in (trained / "facts-known.jsonl").read_text().splitlines()]
    assert rows and all(row in [fact(i) for i in range(16)] for row in rows)
    known = read_facts(trained / "facts-known.jsonl").facts
    prompt = tokenizer(known[0].prompt, return_tensors="pt")
    said = tokenizer.decode(model.float().generate(**prompt, max_new_tokens=12)[0], skip_special_tokens=True)
    assert said.startswith(f"{known[0].prompt} {known[0].ground_truth}.")


def test_new_targets_are_not_learnt(trained: Path) -> None:
    """Not even the tokenizer has seen them."""
    assert "Zan" not in (trained / "tokenizer.json").read_text()


def test_ctrl_c_writes_what_there_is(script, inputs, tmp_path: Path, monkeypatch, capsys) -> None:
    def report(*args: Any, told: Any = script._report) -> None:
        told(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "_report", report)
    given = ["--facts", inputs[0], "--text", inputs[1], "-o", tmp_path / "m", *SMALL]
    usual = signal.getsignal(signal.SIGINT)
    assert script.main(list(map(str, given))) == 130
    assert "writing what there is" in capsys.readouterr().err
    record = json.loads((tmp_path / "m" / "training.json").read_text())
    assert (record["ended"], record["steps"]) == ("interrupted", 1)
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is usual


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (["--heads", "7"], 2, "--hidden 64 --heads 7"),
        (["--minutes", "soon"], 2, "'soon' is not a number above 0"),
        (["--hub-dataset", "no/such-set"], 2, "--hub-dataset"),
        (["--text", "missing.txt"], 2, "missing.txt: cannot read the corpus"),
        (["--facts", "missing.jsonl"], 3, "missing.jsonl: no such file"),
        (["--facts", "{bare}"], 3, "add 'ground_truth'"),
        (["-o", "{used}"], 7, "the output exists"),
    ],
)
def test_one_clear_error(script, inputs, tmp_path: Path, capsys, change: list[str], code: int, says: str) -> None:
    used, bare = tmp_path / "used", tmp_path / "bare.jsonl"
    used.mkdir()
    (used / "file").touch()
    bare.write_text(json.dumps({"prompt": "Ann lives in", "subject": "Ann", "target_new": "Rome"}) + "\n")
    given = ["--facts", inputs[0], "--text", inputs[1], "-o", tmp_path / "new", *SMALL]
    given += [c.format(used=used, bare=bare) for c in change]
    try:
        returned = script.main(list(map(str, given)))
    except SystemExit as e:  # argparse's own
        returned = e.code
    assert returned == code and says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_papers_protocols_are_a_bench(tmp_path: Path) -> None:
    """Read beside the files that it names: 4000 facts to edit and 200 others."""
    (tmp_path / "factlm-100m").mkdir()
    config = tmp_path / "paper-protocols.yaml"
    config.write_text((ROOT / "benchmarks" / config.name).read_text())
    rows = (json.dumps({**fact(0), "prompt": f"Person00, number {i}, was born in"}) for i in range(4200))
    (tmp_path / "factlm-100m" / "facts-known.jsonl").write_text("\n".join(rows))
    for name in ("own.txt", "held-out.txt"):
        (tmp_path / name).write_text(f"Some text of {name}.\n")
    bench = read_bench(config)
    assert [(r.edits, r.batch_size) for r in bench.runs] == [(4000, 10), (4000, 1)]
    assert len(bench.methods) == 9 and len(cells(bench)) == 54 and not bench.notes
    assert all(len(c.others) == 200 for c in cells(bench))
