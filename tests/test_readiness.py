"""What doctor calls ready is loaded, asked and edited; what it does not is refused by all, with the same words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosectl.editing.diagnosis import diagnose
from mosectl.errors import ModelError
from mosectl.model.architecture import MIXTURES, TABLE, skeleton
from mosectl.model.loading import load
from mosectl.model.readiness import loading_report, shapes_of, unmet
from mosectl.storage.checkpoint import open_checkpoint
from support.commands import EASY, run
from support.facts import FACT
from support.hub_server import call, serving
from support.models import OWN, make_tokenizer, pico, save
from support.patches import patch_for

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 269060552\n"
Tensors = dict[str, torch.Tensor]


def weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})

    return spoil


def renamed(part: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {part + name: w for name, w in tensors.items()})


def dropped(lost: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {name: w for name, w in tensors.items() if name != lost})


def config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **fields}))

    return spoil


def text(name: str, content: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(content)

    return spoil


def without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def larger_vocabulary(folder: Path) -> None:
    pico("llama", vocab_size=200).save_pretrained(folder)


def classifier(tensors: Tensors) -> Tensors:
    return {**{n: w for n, w in tensors.items() if n != "lm_head.weight"}, "score.weight": torch.zeros(2, 32)}


def packed(tensors: Tensors) -> Tensors:
    """As bitsandbytes writes them: two weights a byte, in one column, their scales beside them."""
    small = {n: torch.zeros(w.numel() // 2, 1, dtype=torch.uint8) for n, w in tensors.items() if "_proj" in n}
    return {**tensors, **small, **{f"{n}.absmax": torch.ones(len(w) // 32) for n, w in small.items()}}


def only_an_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    text("adapter_config.json", ADAPTER)(folder)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/base"})
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TIED = {"tie_word_embeddings": True}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
GENERATION = "generation_config.json"
Case = tuple[
    Callable[[Path], None], dict[str, Any], str, bool
]  # what is done, to which model, the words, apply refuses
BAD: dict[str, Case] = {
    "compiled": (renamed("_orig_mod."), {}, "a compiled model was saved with its wrapper", True),
    "inside a PEFT wrapper": (renamed("base_model.model."), {}, "a PEFT model was saved with its wrapper", True),
    "parallel": (renamed("module."), {}, "a parallel model was saved with its wrapper", True),
    "names of nobody": (renamed("x."), {}, "weights are missing", True),
    "no head": (dropped("lm_head.weight"), {}, "has no head", True),
    "a norm is missing": (dropped("model.norm.weight"), {}, "model.norm", True),
    "a matrix of another shape": (
        weights(lambda t: {**t, "model.norm.weight": torch.zeros(31)}), {}, "model.norm.weight is [31], not [32]", True),
    "config of another size": (config(vocab_size=400), {}, "embed_tokens.weight is [320, 32], not [400, 32]", True),
    "a tokenizer of another size": (larger_vocabulary, {}, "tokens up to 299, the model embeddings for 200", False),
    "a classifier": (
        both(weights(classifier), config(architectures=["LlamaForSequenceClassification"])), {}, "another head", True),
    "a classifier with tied embeddings": (
        both(weights(classifier), config(architectures=["LlamaForSequenceClassification"])), TIED, "another head", True),
    "a classifier's weights only": (weights(classifier), TIED, "another head (score.weight)", True),
    "an adapter beside the model": (text("adapter_config.json", ADAPTER), {}, "an adapter lies in the folder", True),
    "an adapter": (only_an_adapter, {}, "is an adapter, not a model", True),
    "generation of -3 tokens": (text(GENERATION, '{"max_new_tokens": -3}'), {}, "must be greater than 0", False),
    "null for generation": (text(GENERATION, "null"), {}, "not a JSON object", False),
    "text for numbers": (text(GENERATION, '{"max_new_tokens": "many"}'), {}, "of the wrong kind", False),
    "no JSON for generation": (text(GENERATION, "{"), {}, "damaged", False),
    "no tokenizer": (without(*TOKENIZER), {}, "its tokenizer cannot be loaded: there is none", False),
    "no tokenizer, where an empty one is made": (
        without(*TOKENIZER), {"model_type": "gpt2"}, "its tokenizer cannot be loaded: there is none", False),
    "a damaged tokenizer": (text("tokenizer.json", '{"model": 1}'), {}, "its tokenizer cannot be loaded", False),
    "bitsandbytes": (both(weights(packed), config(quantization_config=NF4)), {}, "quantised (bitsandbytes, 4 bits)", True),
    "GPTQ": (
        both(weights(lambda t: {n.replace("_proj.weight", "_proj.qweight"): w for n, w in t.items()}),
             config(quantization_config={"quant_method": "gptq", "bits": 4})), {}, "quantised (gptq, 4 bits)", True),
    "quantised to weights of the same shape": (
        config(quantization_config={"quant_method": "fp8"}), {}, "its weights are quantised (fp8)", True),
    "LFS weights": (text("model.safetensors", POINTER), {}, "Git LFS pointers, not the files themselves: model.safe", True),
    "LFS tokenizer": (text("tokenizer.json", POINTER), {}, "Git LFS pointers, not the files themselves: tokenizer", True),
    "LFS config": (text("config.json", POINTER), {}, "Git LFS pointers, not the files themselves: config.json", True),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_doctor_ask_edit_and_apply_agree(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, how, words, apply_refuses = BAD[kind]
    model = save(tmp_path / "model", **how)
    patch, facts = tmp_path / "p.safetensors", tmp_path / "facts.jsonl"
    patch_for(model).save(patch)
    facts.write_text(json.dumps(FACT))
    spoil(model)
    commands: dict[str, tuple[object, ...]] = {
        "doctor": ("doctor", model),
        "ask": ("ask", "I met", "-m", model),
        "edit": ("edit", facts, "-m", model, "-o", tmp_path / "new.safetensors", *EASY),
    }
    if apply_refuses:
        commands["apply"] = ("apply", patch, "-m", model, "-o", tmp_path / "out")
    for name, command in commands.items():
        assert run(*command) == 4, name
        out, err = capsys.readouterr()
        assert words in " ".join(err.split()), f"{name}: {err}"
        assert "ready to edit" not in out and "bug" not in err and "→" in err
    assert not (tmp_path / "new.safetensors").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", [*TABLE, *sorted(MIXTURES)])
def test_every_kind_of_model_is_ready(model_type: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if model_type not in OWN else {}
    for n, over in enumerate(({}, tied)):
        found = diagnose(save(tmp_path / f"model{n}", model_type, **over))
        assert found.problems == (), found.problems


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3", "qwen2_moe"])
def test_each_missing_tensor_is_seen_from_the_headers(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "model", model_type))
    bones, shapes = skeleton(checkpoint.config), shapes_of(checkpoint)
    assert unmet(loading_report(bones, shapes)) is None
    for name, (dtype, shape) in list(shapes.items())[:40]:
        assert unmet(loading_report(bones, {n: s for n, s in shapes.items() if n != name})), name
        assert unmet(loading_report(bones, {**shapes, name: (dtype, (*shape[:-1], shape[-1] + 1))})), name


def test_a_tied_model_needs_no_head_and_prefixes_are_transformers_business(tmp_path: Path) -> None:
    model = save(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(model).tensors and not diagnose(model).problems
    plain = save(tmp_path / "gpt2", "gpt2")
    weights(lambda t: {n.removeprefix("transformer."): w for n, w in t.items()})(plain)  # as the first GPT-2 has it
    assert not diagnose(plain).problems and load(plain).model is not None


def test_tokens_added_beyond_the_embeddings_are_only_told(tmp_path: Path) -> None:
    model, tokenizer = save(tmp_path / "model"), make_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(30)])  # ids up to 329, of 320: as Gemma 3 has one for images
    tokenizer.save_pretrained(model)
    found = diagnose(model)
    assert not found.problems and any("10 tokens of its tokenizer have no embedding" in n for n in found.notes)


def test_many_names_of_nobody_take_no_time(tmp_path: Path) -> None:
    bones = skeleton(pico("llama").config)
    for many in (1_200, 1_000_000):
        names = {f"model.layers.{i}.x.weight": ("F32", (1, 1)) for i in range(many)}
        start = time.perf_counter()
        assert unmet(loading_report(bones, names)) and time.perf_counter() - start < 10


def test_nothing_of_transformers_reports_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    capsys.readouterr()
    diagnose(model)
    load(model)
    renamed("_orig_mod.")(model)
    with pytest.raises(ModelError):
        load(model)
    assert capsys.readouterr() == ("", "")


def test_a_large_file_is_no_pointer(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    (model / "README.md").write_text(POINTER)
    (model / "notes.txt").write_text(POINTER + "x" * 2000)
    assert not diagnose(model).problems


# A model on the Hub.


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Any, Callable[..., Any]]]:

    with serving() as (server, address):
        server.repos["me/model"] = {}
        folder = save(tmp_path / "model", "gemma2")
        server.commit("me/model", {p.name: p.read_bytes() for p in folder.iterdir()})

        yield server, lambda *args, **env: call(env.pop("HF_ENDPOINT", address), tmp_path, *args, **env)


def test_doctor_finds_a_model_where_the_others_find_it(hub: tuple[Any, Callable[..., Any]]) -> None:
    server, call = hub
    assert call("doctor", "me/model", HF_HUB_OFFLINE="1").returncode == 9
    online = call("doctor", "me/model")
    assert online.returncode == 0 and "ready to edit" in online.stdout, online.stderr
    got = [h for method, path, h in server.asked if method == "GET" and path.endswith("model.safetensors")]
    assert got and all("range" in {k.lower() for k in h} for h in got), "headers only"
    early = call("doctor", "me/model", HF_HUB_OFFLINE="1")
    assert early.returncode == 9, "config and tokenizer are in the cache, the weights are not"
    assert call("ask", "I met", "-m", "me/model").returncode == 0
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        found = call("doctor", "me/model", **env)
        assert found.returncode == 0 and found.stdout == online.stdout, found.stderr


def test_doctor_judges_a_remote_model_by_its_headers(hub: tuple[Any, Callable[..., Any]], tmp_path: Path) -> None:
    server, call = hub
    bad = save(tmp_path / "bad")
    renamed("_orig_mod.")(bad)
    server.repos["me/bad"] = {}
    server.commit("me/bad", {p.name: p.read_bytes() for p in bad.iterdir()})
    found = call("doctor", "me/bad")
    assert found.returncode == 4 and "a compiled model was saved" in found.stdout
