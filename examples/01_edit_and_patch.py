"""Edit two facts of the demo model from Python, save the patch, read it again."""

import tempfile
from pathlib import Path

import mosectl

HERE = Path(__file__).parent

facts = mosectl.read_facts(HERE / "facts.jsonl", limit=2).facts
options = mosectl.EditOptions(corpus=str(HERE / "corpus.txt"))
result = mosectl.edit(facts, HERE / "demo-model", options=options)
for fact in result.facts:
    print(f"{fact.fact.prompt}: {fact.before} -> {fact.after} ({fact.status})")
print(f"largest drift of a singular value: {max(s.spectrum_drift for s in result.stability):.1e}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "patch.safetensors"
    result.patch.save(path)
    patch = mosectl.Patch.load(path)  # checks everything in the file
    print(f"patch {patch.id[:12]}: {path.stat().st_size:,} bytes, modules {', '.join(patch.changes)}")
    assert patch.id == result.patch.id
assert all(fact.status == "changed" for fact in result.facts)
