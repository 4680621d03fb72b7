"""The benchmark scripts run, and the plan of an edit says about what it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosectl.facts.records import as_facts
from support.patches import patch_for, small
from support.paths import DEMO, ROOT


def run(script: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_edit_of_a_random_model_against_its_plan() -> None:
    asked = ("--shape", "tiny", "--layers", "1,2", "--facts", 3, "--rounds", 1, "--device", "cpu", "--dtype", "float32")
    planned, _, done = run("llama3_8b_shape.py", *asked).partition("\n")
    plan, found = json.loads(planned)["plan"], json.loads(done)
    assert found["facts_a_second"] > 0 and {"statistics", "targets", "solve"} <= found["peak_gb"].keys()
    assert plan["peak_gb"] / max(found["peak_gb"].values()) == pytest.approx(
        found["plan_against_measured"]["peak"], rel=0.2
    )


def test_the_plan_of_a_large_model_needs_none_of_its_memory() -> None:
    """8.03 billion parameters in bf16 on a GPU's worth of memory: the weights and at most half as much again."""
    (line,) = run("llama3_8b_shape.py", "--plan", "--device", "cpu", "--gpu").splitlines()
    found = json.loads(line)
    assert found["parameters"] == 8_030_261_248
    assert 16.06 < found["plan"]["peak_gb"] < 24 and found["plan"]["patch_mb"] < 100


def test_the_solve_benchmark() -> None:
    rows = [json.loads(line) for line in run("speed.py", "solve", "--sizes", 32, "--device", "cpu").splitlines()]
    assert [row["what"].split(":")[0] for row in rows] == ["d = 32"] * 3 and rows[0]["ratio"] == "1"


def test_the_solve_against_the_dense_form() -> None:
    factors, compact, dense = (json.loads(line) for line in run("turns.py", "--facts", 2).splitlines())
    assert factors["d"] == 576 and max(compact["compact"]["ranks"]) <= 24
    assert compact["compact"]["missing of what is asked"] < 1 and dense["ratio"] > 1


def test_llama_cpp_is_skipped_with_a_reason() -> None:
    assert "llama-cpp-python" in (said := run("serve_gguf.py")) or "give --gguf" in said


def test_the_size_of_an_edit_as_a_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    assert "give --model" in json.loads(run("lora_size.py"))["skipped"]
    turned = small(patch_for(DEMO, (1, 2)), 4, 0)
    turned.save(tmp_path / "1.safetensors")  # made already: no edit is needed
    asked = ("--model", DEMO, "--facts", ROOT / "examples" / "facts.jsonl", "--counts", 1, "--cut", 1, "-o", tmp_path)
    exact, half, cut = (
        line.split(" | ") for line in run("lora_size.py", *asked).splitlines() if line.startswith("| 1")
    )
    assert exact[2:5] == ["2", "8", "rank 8, float32"] and exact[6] == half[6] == "–"
    assert float(half[5]) == pytest.approx(float(exact[5]) / 2, abs=0.01)
    apart = [float(row[-1].strip(" |")) for row in (exact, half, cut)]
    assert apart[0] < 1e-4 < apart[1] < apart[2] and cut[4] == "rank 1, float32" and cut[6].endswith("%")


def test_quantised_serving_says_what_it_needs() -> None:
    assert "give --model" in json.loads(run("serve_quantised.py"))["skipped"]
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(
        AssertionError, match=r"--quantise nf4 needs the packages peft and bitsandbytes .*: pip install"
    ):
        run("serve_quantised.py", "--model", DEMO, "--quantise", "nf4")


def test_questions_in_a_chat() -> None:
    assert "give --model" in json.loads(run("chat.py"))["skipped"]
    path = ROOT / "benchmarks" / "chat.py"
    spec = importlib.util.spec_from_file_location("chat_benchmark", path)
    assert spec and spec.loader
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    for name in ("real-facts.jsonl", "chat-facts.jsonl"):
        facts = as_facts(path.with_name(name), "ask about")
        asked = {
            q for f in facts for p in (f.prompt, *(probe.prompt for probe in f.locality)) for q in chat.questions(p)
        }
        before = dict.fromkeys(asked, "It is so.")
        said = {q: f"It is {f.target_new}." for f in facts for q in chat.questions(f.prompt)}
        found = chat.counted(facts, before, before | said)
        assert found["new object"].startswith("100 ") and found["old object"].startswith("0 ")
        assert not found["same_subject same sentence"].startswith("0 "), "most are not about the facts themselves"
        assert found["neighborhood new object"].startswith("0 ")
    with pytest.raises(SystemExit, match="no question for"):
        chat.questions("Nobody asks")


def test_real_models_are_skipped_with_a_reason() -> None:
    assert "give --on" in json.loads(run("real.py"))["skipped"]
    assert "no facts file" in json.loads(run("real.py", "--on", "model=nowhere.jsonl"))["skipped"]
