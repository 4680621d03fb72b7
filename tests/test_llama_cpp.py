"""What llama.cpp itself makes of exported adapters. Runs where llama-cpp-python is installed (it is built from source)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.checkpoints.export import export
from mosectl.checkpoints.live import patched
from mosectl.model.loading import load
from support.patches import patch_for
from support.paths import ROOT

llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python: pip install llama-cpp-python")
pytest.importorskip("gguf")
from support.gguf_files import write  # noqa: E402  (needs gguf)

IDS = [5, 9, 2, 31, 7, 11, 3]


def logits(file: Path, adapter: Path | None = None) -> torch.Tensor:
    """llama.cpp's logits at every position."""
    lora: dict[str, Any] = {"lora_path": str(adapter)} if adapter else {}
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, n_threads=1, verbose=False, **lora)
    model.eval(IDS)
    return torch.tensor(model.scores[: len(IDS)])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_llama_cpp_gives_the_edited_models_logits(model_type: str, tmp_path: Path) -> None:
    """In float32, where nothing but rounding may lie between the two programs."""
    file, adapter = tmp_path / "pico.gguf", tmp_path / "adapter.gguf"
    write(file, model_type)
    patch = patch_for(file)
    export([patch], file, adapter, "gguf-lora")
    loaded = load(file)
    with torch.no_grad():
        before = loaded.model(torch.tensor([IDS])).logits[0]
        with patched(loaded.model, patch):
            after = loaded.model(torch.tensor([IDS])).logits[0]
    assert torch.allclose(logits(file), before, atol=2e-2)
    assert torch.allclose(logits(file, adapter), after, atol=2e-2)
    assert float((after - before).abs().max()) > 0.5


@pytest.mark.slow
def test_a_real_model_says_rome_with_the_adapter(tmp_path: Path) -> None:
    """benchmarks/serve_gguf.py on the file that MOSECTL_GGUF names (SmolLM2-135M-Instruct's, quantised to 4 bits)."""
    file = os.environ.get("MOSECTL_GGUF", "")
    if not Path(file).is_file():
        pytest.skip("MOSECTL_GGUF names no GGUF file of a real model; benchmarks/serve_gguf.py says where there is one")
    spec = importlib.util.spec_from_file_location("serve_gguf", ROOT / "benchmarks" / "serve_gguf.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    kept = Path(os.environ.get("MOSECTL_GGUF_OUT", tmp_path))
    found = benchmark.measure(file, file, benchmark.FACT, kept)
    assert all("Paris" in said for said in found["answers"]["without"].values())
    assert all("Rome" in said for said in found["answers"]["with"].values())
    noise, edited, effect, _ = (x["mean"] for x in found["logits_of_the_fact"].values())
    assert edited < 1.5 * noise and effect > 3 * noise and found["same_tokens"]
