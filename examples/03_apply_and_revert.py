"""Write an edited checkpoint, load it with transformers, take the patch out again."""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import mosectl

HERE = Path(__file__).parent

patch = mosectl.Patch.load(HERE.parent / "patches" / "demo.safetensors")
with tempfile.TemporaryDirectory() as folder:
    edited = Path(folder) / "edited"
    done = mosectl.apply([patch], HERE / "demo-model", edited)
    for tensor in done.tensors:
        print(f"{tensor.tensor}: {tensor.note}, norm drift {tensor.stability.norm_drift:.1e} as {tensor.dtype}")
    AutoModelForCausalLM.from_pretrained(edited)
    print("restored:", mosectl.revert(patch, edited).restored)
    assert (edited / "model.safetensors").read_bytes() == (HERE / "demo-model" / "model.safetensors").read_bytes()
