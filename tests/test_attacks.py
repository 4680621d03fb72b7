"""Bad inputs that were once seen to hang, to exhaust memory or to end in "this is a bug": the commands as users give them.

Each case makes its input and returns a command line. Whatever it is, the exit code is the documented one, the message is one of
ours, and it costs less than ten seconds and 2 GB.
"""
# ruff: noqa: E501

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as packed

from mosectl.checkpoints.apply import apply
from mosectl.patch.change import Change
from mosectl.patch.file import Patch, canonical, content_id
from mosectl.patch.fingerprint import fingerprint
from support.commands import run
from support.models import make_tokenizer, save
from support.patches import patch_for

MODULE = "model.layers.1.mlp.down_proj"
FACT = {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and"}
DEEP = "[" * 100_000
BENCH = """models: [{model}]
datasets: [{{file: {facts}, facts: [1]}}]
methods: [memit]
"""
SECONDS, BYTES = 10, 2 * 10**9
Argv = list[object]


class World:
    """A model, its edited copy, a facts file and a patch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save(folder / "model")
        self.patch = folder / "p.safetensors"
        patch_for(self.model).save(self.patch)
        self.facts = self.write("facts.jsonl", json.dumps(FACT))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    @property
    def edited(self) -> Path:
        """The model with the patch applied."""
        out = self.folder / "edited"
        if not out.exists():
            apply([Patch.load(self.patch)], self.model, out)
        return out

    def copy(self) -> Path:
        """A model of one's own, to be spoilt."""
        return Path(shutil.copytree(self.model, self.folder / "spoilt"))

    def pipe(self) -> Path:
        path = self.folder / "pipe"
        os.mkfifo(path)
        return path

    def sparse(self, start: bytes = b"") -> Path:
        path = self.folder / "sparse"
        with path.open("wb") as file:
            file.write(start)
            file.truncate(20 * 10**9)
        return path

    def recorded(self, name: str = "odd.safetensors", **fields: Any) -> Path:
        """The patch with other fields in its record and an id that fits them."""
        patch = Patch.load(self.patch)
        record = json.loads(patch.record)
        for key, value in fields.items():
            *path, last = key.split("__")
            place = record
            for part in path:
                place = place[part]
            place[last] = value
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        text = text.encode("utf-8", "replace").decode()
        record = {**record, "id": content_id(text, patch.tensors)}
        return self.write(name, packed(dict(patch.tensors), {"mosectl": json.dumps(record, sort_keys=True)}))

    def compact(self, n: int, name: str, shape: tuple[int, int] | None = None) -> Path:
        """A small compact patch for a huge weight; ``shape`` is what its record claims."""
        u = torch.zeros(n, 1)
        u[0] = 1
        shape = shape or (n, n)
        base = fingerprint(f"{MODULE}.weight", torch.zeros(8, 8))
        base = type(base)(base.tensor, shape, base.dtype, base.sha256, base.sample)
        changes = {MODULE: Change({"U": u, "Q": torch.ones(1, 1)})}
        path = self.folder / name
        Patch(changes, "mose", "output", {"x": name}, "m", None, "llama", {MODULE: base}, (), {}, 0, {}).save(path)
        return path

    def bench(self, text: str) -> Argv:
        return ["bench", self.write("bench.yaml", text), "-o", self.folder / "results"]

    def config(self, **fields: Any) -> Path:
        folder = self.copy()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    def journal(self, change: Callable[[dict[str, Any]], None]) -> Path:
        file = self.edited / "mosectl.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return self.edited

    def edit(self, model: Path | None = None, facts: Path | None = None, *more: object) -> Argv:
        return ["edit", facts or self.facts, "-m", model or self.model, "-o", self.folder / "new.safetensors", *more]


def names(w: World, n: int) -> Path:
    """A patch whose header has many tensors."""
    header: dict[str, Any] = {"__metadata__": {"mosectl": canonical({"format": 1})}}
    for i in range(n):
        offsets = [4 * i, 4 * i + 4]
        header[f"a.b{i}.R"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    return w.write("names.safetensors", struct.pack("<Q", len(raw)) + raw + struct.pack("<f", 1.0) * n)


def template(w: World, text: str) -> Path:
    folder = w.copy()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    tokenizer.save_pretrained(folder)
    return folder


def weights(w: World, value: float) -> Path:
    """The model with one layer's output projection filled with a value."""
    from safetensors.torch import load_file, save_file

    folder = w.copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def planted(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder


def lfs(folder: Path, name: str) -> Path:
    return planted(folder, name, f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")


def without(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()
    return folder


def piped(folder: Path, name: str) -> Path:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    return folder


def other_size(w: World) -> Path:
    """A patch for a model of another size."""
    model = save(w.folder / "larger", hidden_size=64, head_dim=16)
    path = w.folder / "larger.safetensors"
    patch_for(model).save(path)
    return path


def bombs() -> str:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["a0: &a0 [x]", *levels])


# name → (exit codes that are right, the input and its command line)
CASES: Mapping[str, tuple[set[int], Callable[[World], Argv]]] = {
    # Number 17: small input, large cost.
    "diff of wide compact patches": ({0}, lambda w: ["diff", w.compact(60_000, "a"), w.compact(60_000, "b")]),
    "merge with a claimed width": (
        {0, 5},
        lambda w: ["merge", w.compact(16, "a", (16, 2**40)), w.compact(16, "b", (2**40, 16)), "-o", w.folder / "m"],
    ),
    "many names": ({5}, lambda w: ["inspect", names(w, 40_000)]),
    "patch is a pipe": ({5}, lambda w: ["inspect", w.pipe()]),
    "patch is endless": ({5}, lambda w: ["inspect", "/dev/zero"]),
    "patch is sparse": ({5}, lambda w: ["inspect", w.sparse()]),
    "patch with a sparse rest": ({5}, lambda w: ["inspect", w.sparse(w.patch.read_bytes())]),
    "facts are a pipe": ({3}, lambda w: ["check", w.pipe()]),
    "facts are endless": ({3}, lambda w: ["check", "/dev/zero"]),
    "facts are sparse": ({3}, lambda w: ["check", w.sparse(b'{"prompt": "a')]),
    "corpus is a pipe": ({2}, lambda w: w.edit(None, None, "--corpus", w.pipe())),
    "corpus is endless": ({2}, lambda w: w.edit(None, None, "--corpus", "/dev/zero")),
    "corpus is sparse": ({2}, lambda w: w.edit(None, None, "--corpus", w.sparse(b"text\n"))),
    "bench is a pipe": ({2}, lambda w: ["bench", w.pipe(), "-o", w.folder / "results"]),
    "bench is sparse": ({2}, lambda w: ["bench", w.sparse(b"a: 1\n"), "-o", w.folder / "results"]),
    "bench is a bomb": ({2}, lambda w: w.bench(bombs())),
    "editor is a pipe": ({5}, lambda w: w.edit(None, None, "--method", "horse", "--editor", w.pipe())),
    "config is a pipe": ({4}, lambda w: ["doctor", piped(w.copy(), "config.json")]),
    "index is a pipe": ({4}, lambda w: ["doctor", piped(without(w.copy(), "model.safetensors"), "model.safetensors.index.json")]),
    "journal is a pipe": ({4}, lambda w: ["log", piped(w.edited, "mosectl.json")]),
    "weights are a pipe": ({4}, lambda w: ["ask", "I met", "-m", piped(w.copy(), "model.safetensors")]),
    "a million layers, doctor": ({4}, lambda w: ["doctor", w.config(num_hidden_layers=1_000_000)]),
    "a million layers, apply": (
        {4, 6},
        lambda w: ["apply", w.patch, "-m", w.config(num_hidden_layers=1_000_000), "-o", w.folder / "out"],
    ),
    "a million layers, ask": ({4}, lambda w: ["ask", "I met", "-m", w.config(num_hidden_layers=1_000_000)]),
    "a template that loops": (
        {2, 4},
        lambda w: ["ask", "I", "--chat", "-m", template(w, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")],
    ),
    "a template that grows": (
        {2, 4},
        lambda w: ["ask", "I", "--chat", "-m", template(w, "{% set x = 'a' * 10**6 %}{% for i in range(99999) %}{{ x }}{% endfor %}")],
    ),
    "a template with a power": ({2, 4}, lambda w: ["ask", "I", "--chat", "-m", template(w, "{{ 'a' * 10**12 }}")]),
    # Number 18: fields below the first level, and odd JSON.
    "scores are a text": ({5}, lambda w: ["inspect", w.recorded(metrics={"scores": "x"})]),
    "a score is a huge number": ({5}, lambda w: ["inspect", w.recorded(metrics={"scores": {"reliability": 10**400}})]),
    "stability is a number": ({5}, lambda w: ["inspect", w.recorded(metrics={"stability": 3})]),
    "compaction is a list": ({5}, lambda w: ["inspect", w.recorded(metrics={"compaction": [1]})]),
    "merged is a text": ({0, 5}, lambda w: ["inspect", w.recorded(options={"merged": "x"})]),
    "half a character": ({5}, lambda w: ["inspect", w.recorded(model="\ud800")]),
    "a nested option": ({0, 5}, lambda w: ["inspect", "--json", w.recorded(options={"x": json.loads("[" * 900 + "]" * 900)})]),
    "versions are a list in a version": ({0, 5}, lambda w: ["push", w.recorded(versions={"mosectl": [1]}), "a/b", "--dry-run"]),
    "index of numbers": (
        {4},
        lambda w: ["doctor", planted(without(w.copy(), "model.safetensors"), "model.safetensors.index.json", '{"weight_map": {"a": 1}}')],
    ),
    "deep config": ({4}, lambda w: ["doctor", planted(w.copy(), "config.json", DEEP)]),
    "deep index": (
        {4}, lambda w: ["doctor", planted(without(w.copy(), "model.safetensors"), "model.safetensors.index.json", DEEP)]
    ),
    "deep tokenizer": ({4}, lambda w: ["ask", "I", "-m", planted(w.copy(), "tokenizer.json", DEEP)]),
    "deep generation config": ({4}, lambda w: ["ask", "I", "-m", planted(w.copy(), "generation_config.json", DEEP)]),
    "deep journal": ({4}, lambda w: ["log", planted(w.edited, "mosectl.json", DEEP)]),
    "deep facts": ({3}, lambda w: ["check", w.write("f.jsonl", DEEP)]),
    "a long integer in facts": ({3}, lambda w: ["check", w.write("f.jsonl", '{"prompt": ' + "9" * 5000 + "}")]),
    "no tensors in the journal, verify": ({4, 5, 6}, lambda w: ["verify", w.journal(lambda j: j.update(tensors={}))]),
    "no tensors in the journal, revert": (
        {4, 5, 6}, lambda w: ["revert", w.journal(lambda j: j.update(tensors={})), "--patch", Patch.load(w.patch).id]
    ),
    "a list in the journal": ({4}, lambda w: ["log", w.journal(lambda j: j.update(kept_base=[]))]),
    "a date in a bench": ({2}, lambda w: w.bench("models: 2026-01-01\n")),
    "a long integer in a bench": ({2}, lambda w: w.bench("seeds: [" + "9" * 5000 + "]\n")),
    "the same key twice in a bench": ({2}, lambda w: w.bench("seeds: [1]\nseeds: [2]\n")),
    "deep bench": ({2}, lambda w: w.bench("a: " + DEEP)),
    # Number 19: realistic ones.
    "two sizes, apply": (
        {5, 6}, lambda w: ["apply", w.patch, other_size(w), "-m", w.model, "-o", w.folder / "out", "--allow-conflicts"]
    ),
    "two sizes, diff": ({0, 5, 6}, lambda w: ["diff", w.patch, other_size(w)]),
    "two sizes, merge": ({5, 6}, lambda w: ["merge", w.patch, other_size(w), "-o", w.folder / "m.safetensors"]),
    "NaN weights, apply": ({4, 6, 8}, lambda w: ["apply", w.patch, "-m", weights(w, float("nan")), "-o", w.folder / "out", "--force"]),
    "NaN weights, inspect": ({4, 6}, lambda w: ["inspect", w.patch, "-m", weights(w, float("nan"))]),
    "NaN weights, export": ({4, 6, 8}, lambda w: ["export", w.patch, "-m", weights(w, float("nan")), "-o", w.folder / "out", "--force"]),
    "NaN weights, edit": ({4, 8}, lambda w: w.edit(weights(w, float("nan")))),
    "infinite weights, edit": ({4, 8}, lambda w: w.edit(weights(w, float("inf")))),
    "zero weights, edit": ({4, 8}, lambda w: w.edit(weights(w, 0.0), None, "--layers", "1")),
    "zero weights, apply": ({0, 4, 6}, lambda w: ["apply", w.patch, "-m", weights(w, 0.0), "-o", w.folder / "out", "--force"]),
    "a name too long": ({7}, lambda w: ["apply", w.patch, "-m", w.model, "-o", w.folder / ("x" * 300)]),
    "a patch name too long": ({7}, lambda w: ["merge", w.patch, w.compact(16, "b"), "-o", w.folder / ("x" * 300)]),
    "slashes in a place": ({2}, lambda w: ["inspect", "hf://me/x//y.safetensors"]),
    "the same key twice in a fact": (
        {3}, lambda w: ["check", w.write("f.jsonl", '{"prompt": "a b", "subject": "b", "target_new": "c", "target_new": "d"}')]
    ),
    # Numbers 21 and 22: users' reports.
    "a prompt beyond the positions": (
        {3}, lambda w: w.edit(save(w.folder / "gpt2", "gpt2"), w.write("f.jsonl", json.dumps({**FACT, "prompt": "a " * 400 + FACT["prompt"]})))
    ),
    "a question beyond the positions": ({2}, lambda w: ["ask", "a " * 400, "-m", save(w.folder / "gpt2", "gpt2")]),
    "doctor: an adapter in the folder": (
        {4}, lambda w: ["doctor", planted(w.copy(), "adapter_config.json", '{"peft_type": "LORA"}')]
    ),
    "doctor: max_new_tokens": ({4}, lambda w: ["doctor", planted(w.copy(), "generation_config.json", '{"max_new_tokens": -3}')]),
    "doctor: generation config is null": ({4}, lambda w: ["doctor", planted(w.copy(), "generation_config.json", "null")]),
    "doctor: a vocabulary of another size": ({4}, lambda w: ["doctor", w.config(vocab_size=321)]),
    "doctor: no tokenizer": ({4}, lambda w: ["doctor", without(w.copy(), "tokenizer*", "special*")]),
    "doctor: pointers of Git LFS": ({4}, lambda w: ["doctor", lfs(w.copy(), "model.safetensors")]),
    "doctor: a tokenizer of Git LFS": ({4}, lambda w: ["doctor", lfs(w.copy(), "tokenizer.json")]),
    "ask: no tokenizer": ({4}, lambda w: ["ask", "I", "-m", without(w.copy(), "tokenizer*", "special*")]),
    "an adapter as a model": (
        {4}, lambda w: ["ask", "I", "-m", w.write("adapter/adapter_config.json", '{"peft_type": "LORA"}').parent]
    ),
}  # fmt: skip


@pytest.fixture
def bounded() -> Iterator[None]:
    """2 GB of address space beyond what is taken already."""
    with open("/proc/self/statm") as file:  # noqa: PTH123  (no Path: it is made by the kernel)
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize("name", CASES)
def test_what_was_tried(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], bounded: None
) -> None:
    right, make = CASES[name]
    monkeypatch.chdir(tmp_path)
    argv = make(World(tmp_path))
    capfd.readouterr()
    start = time.perf_counter()
    code = run(*argv)
    took, said = time.perf_counter() - start, capfd.readouterr()
    assert "this is a bug" not in said.err and "Traceback" not in said.err, said.err
    assert code in right, said.err
    assert took < SECONDS, f"{took:.1f} s"
    assert code == 0 or "→" in said.err, "the next step is missing"
    assert not list(tmp_path.glob(".*")), "something is left behind"
