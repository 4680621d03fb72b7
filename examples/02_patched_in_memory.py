"""Put a patch on a loaded model for a while: inside the block it is edited, afterwards bit for bit what it was."""

from pathlib import Path

import mosectl
from mosectl.model.questions import generate

HERE = Path(__file__).parent

patch = mosectl.Patch.load(HERE.parent / "patches" / "demo.safetensors")
loaded = mosectl.load(HERE / "demo-model")
prompt = patch.facts[0].prompt
before = {name: p.clone() for name, p in loaded.model.named_parameters()}

print(prompt, "|", *generate(loaded.model, loaded.tokenizer, [prompt]))
with mosectl.patched(loaded.model, patch):
    (said,) = generate(loaded.model, loaded.tokenizer, [prompt])
    print(prompt, "|", said)
    assert said.strip().startswith(patch.facts[0].target_new)
assert all(p.equal(before[name]) for name, p in loaded.model.named_parameters())
