"""GGUF files as models: read, edited, served back; and what is said of those that cannot be."""

from __future__ import annotations

import json
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.checkpoints.apply import apply
from mosectl.checkpoints.export import export
from mosectl.checkpoints.live import patched
from mosectl.editing.diagnosis import diagnose
from mosectl.errors import BaseMismatch, HubError, ModelError, Notice, OutputError, UsageError
from mosectl.measure.before_after import _at_hand
from mosectl.model.loading import load
from mosectl.patch.fingerprint import sha256
from mosectl.storage.checkpoint import locate, open_checkpoint
from mosectl.storage.hub import cached_model
from support.commands import EASY, run
from support.facts import FACT
from support.hub_server import serving
from support.patches import MODULE, make, patch_for

gguf = pytest.importorskip("gguf")
from support.gguf_files import write  # noqa: E402  (needs gguf)

IDS = torch.tensor([[5, 9, 2, 31, 7, 11, 3]])
WEIGHT = f"{MODULE}.weight"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    write(tmp_path / "models" / "pico.gguf")
    return tmp_path / "models" / "pico.gguf"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_the_model_is_read_as_it_was_before_the_converter(model_type: str, tmp_path: Path) -> None:
    """Attention's rows in their order, norms without Gemma's 1, GPT-2's matrices the right way round."""
    model = write(tmp_path / "pico.gguf", model_type)
    loaded = load(tmp_path / "pico.gguf")
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-5)
    assert loaded.checkpoint is not None and loaded.checkpoint.model == "pico.gguf"
    if model_type != "llama":  # their files would hold tokenizers of other kinds
        return
    assert loaded.tokenizer.bos_token == "<s>"
    assert loaded.tokenizer.decode(loaded.tokenizer("The capital of Avaland is").input_ids).endswith("Avaland is")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_the_dequantised_weights_are_kept_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "pico.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path / "pico.gguf")
    stored = next(t for t in gguf.GGUFReader(tmp_path / "pico.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    wanted = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    found = checkpoint.read(WEIGHT)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    patch = patch_for(tmp_path / "pico.gguf")
    assert patch.base[MODULE].sha256 == sha256(wanted) and patch.base[MODULE].dtype == "F32"
    assert checkpoint.gguf is not None and checkpoint.gguf.quantised == kind.startswith("Q")


def test_a_file_is_unpacked_once_and_again_when_it_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(Notice, match=r"pico.gguf is unpacked to float32 once .* kept in"):
        first = open_checkpoint(file)
    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter("error")
        m.setattr("mosectl.storage.gguf._convert", lambda *_: pytest.fail("unpacked again"))
        assert open_checkpoint(file).folder == open_checkpoint(file.parent).folder == first.folder
    before = first.read(WEIGHT)
    file.unlink()
    write(file, kind="Q8_0")
    again = open_checkpoint(file)
    assert again.folder != first.folder and not first.folder.exists(), "what was there before is not kept"
    assert not torch.equal(again.read(WEIGHT), before)


def test_edit_ask_and_eval_take_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, facts = tmp_path / "p.safetensors", tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(FACT))
    assert run("edit", facts, "--model", file, "-o", out, *EASY) == 0
    assert "--to gguf-lora -o adapter.gguf" in " ".join(capsys.readouterr().err.split()), "what comes next"
    assert run("edit", facts, "--model", file.parent, "-o", tmp_path / "q", *EASY, "--dry-run") == 0
    capsys.readouterr()
    assert run("inspect", out, "--model", file) == 0 and "pico.gguf" in capsys.readouterr().out
    assert run("ask", FACT["prompt"], "--model", file, "--patch", out, "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["before"] != answer["after"]
    assert run("eval", out, facts, "--model", file, "--json") == 0
    assert run("eval", file, facts, "--json") == 0, "a model, not a patch"


def test_the_adapter_is_right_for_the_very_file(file: Path, tmp_path: Path) -> None:
    patch = patch_for(file)
    done = export([patch], file, file.parent / "adapter.gguf", "gguf-lora")
    reader = gguf.GGUFReader(file.parent / "adapter.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "llama"
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    base = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(file).tensors}
    for module, change in patch.changes.items():
        name = f"blk.{module.split('.')[2]}.ffn_down.weight"
        wanted = change.apply(base[name].double()) - base[name]
        assert torch.allclose((found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]).double(), wanted, atol=1e-5)
    assert done.modelfile == file.parent / "Modelfile"
    assert open_checkpoint(file.parent).gguf is not None, "the adapter beside it is not taken for a model"
    other = replace(patch, base={m: replace(t, sha256="0" * 64) for m, t in patch.base.items()})
    with pytest.raises(BaseMismatch):
        export([other], file, tmp_path / "other.gguf", "gguf-lora")


def test_apply_writes_an_ordinary_checkpoint(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch, out = patch_for(file), tmp_path / "edited"
    with pytest.warns(Notice, match="a checkpoint of float32 weights, no GGUF file"):
        apply([patch], file, out)
    live = load(file)
    with patched(live.model, patch):
        assert torch.equal(logits(load(out).model), logits(live.model))
    journal = json.loads((out / "mosectl.json").read_text())
    assert journal["model"] == "pico.gguf" and journal["base_path"] == str(file)
    assert open_checkpoint(out).gguf is None
    assert run("verify", out) == 0 and run("revert", patch.id, "--model", out) == 0
    assert torch.equal(open_checkpoint(out).read(WEIGHT), open_checkpoint(file).read(WEIGHT))
    assert run("revert", patch.id, "--model", file) == 4 and "no patch is applied to it" in capsys.readouterr().err


def test_the_base_is_found_in_the_file_where_it_was_not_kept(file: Path, tmp_path: Path) -> None:
    patch, out = patch_for(file), tmp_path / "edited"
    apply([patch], file, out, keep_base=False)
    assert run("revert", patch.id, "--model", out) == 0
    assert torch.equal(open_checkpoint(out).read(WEIGHT), open_checkpoint(file).read(WEIGHT))


def test_doctor_says_what_quantisation_means(tmp_path: Path) -> None:
    write(tmp_path / "pico.gguf", kind="Q8_0")
    notes = " ".join(diagnose(tmp_path / "pico.gguf").notes)
    assert "read from pico.gguf (Q8_0, F32)" in notes and "an edit is made for the rounded ones" in notes


def test_positions_that_transformers_does_not_scale_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosectl.storage.gguf._UNREAD", {"output_norm.weight": "its scaling of positions"})
    write(tmp_path / "pico.gguf")
    assert "does not read its scaling of positions" in " ".join(diagnose(tmp_path / "pico.gguf").notes)


# What cannot be read.


def test_several_files_in_a_folder_want_a_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(file.with_name("pico-Q8_0.gguf"), kind="Q8_0")
    assert run("doctor", file.parent) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "holds 2 GGUF files: pico-Q8_0.gguf, pico.gguf" in told and "--model" in told
    assert run("doctor", file) == 0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"split.count": 2}, "is one of 2 parts"),
        ({"general.type": "adapter"}, "of type 'adapter'"),
        ({"general.type": "mmproj"}, "of type 'mmproj'"),
        ({"llama.block_count": 2_000_000}, "block_count is 2,000,000"),
        ({"llama.block_count": 4}, "weights are missing"),
        ({"llama.embedding_length": 1_000_000}, "its metadata claims"),
    ],
)
def test_what_is_no_whole_model_is_told(
    fields: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pico.gguf", fields=fields)
    assert run("doctor", tmp_path / "pico.gguf") == 4
    assert told in " ".join(capsys.readouterr().err.split())


def header(*parts: object, tensors: int = 0, fields: int = 1, version: int = 3) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, tensors, fields)
    for part in parts:
        out += part if isinstance(part, bytes) else struct.pack("<Q", len(str(part))) + str(part).encode()
    return out


ARCHITECTURE = ("general.architecture", struct.pack("<I", 8), "llama")
BROKEN = {
    "empty": (b"", "cut short"),
    "something else": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "another version": (header(version=1), "version 1 is not read"),
    "the other byte order": (header(version=3 << 24), "is not read"),
    "counts beyond reason": (header(tensors=2**60), "more than any model has"),
    "a list that would never end": (
        header("x", struct.pack("<IIQ", 9, 0, 2**60), bytes(64)),
        "cut short",
    ),
    "a list of texts that would never end": (header("x", struct.pack("<IIQ", 9, 8, 2**60), bytes(64)), "cut short"),
    "a text that is none": (header("x", struct.pack("<I", 8), struct.pack("<Q", 2), b"\xff\xfe"), "damaged"),
    "a huge text": (header("x", struct.pack("<IQ", 8, 2**40)), "a text of"),
    "an unknown kind": (header("x", struct.pack("<I", 77), bytes(64)), "unknown kind 77"),
    "lists of lists": (header("x", struct.pack("<IIQ", 9, 9, 1), bytes(64)), "unknown kind 9"),
    "no architecture": (header(fields=0), "does not say its architecture"),
    "a tensor of many dimensions": (
        header(*ARCHITECTURE, "t", struct.pack("<I", 2**31), bytes(64), tensors=1),
        "dimensions",
    ),
    "a tensor of an unknown type": (
        header(*ARCHITECTURE, "t", struct.pack("<IQIQ", 1, 4, 999, 0), bytes(64), tensors=1),
        "unknown type 999",
    ),
    "a tensor beyond the end": (
        header(*ARCHITECTURE, "t", struct.pack("<IQIQ", 1, 2**40, 0, 0), bytes(64), tensors=1),
        "bytes are missing",
    ),
    "an architecture of tomorrow": (
        header("general.architecture", struct.pack("<I", 8), "tomorrow"),
        "architecture 'tomorrow'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, told = BROKEN[case]
    (tmp_path / "x.gguf").write_bytes(data)
    assert run("doctor", tmp_path / "x.gguf") == 4
    err = " ".join(capsys.readouterr().err.split())
    assert told in err and "x.gguf" in err and "→" in err and "Traceback" not in err


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_short(share: float, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert run("doctor", file) == 4 and "cut short" in " ".join(capsys.readouterr().err.split())


def test_the_package_gguf_is_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run("doctor", file) == 2 and 'pip install "mosectl[gguf]"' in capsys.readouterr().err


def test_a_revision_is_for_hub_models(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", file, "--revision", "main") == 2 and "is a file" in capsys.readouterr().err


def test_a_cache_without_room_or_rights_says_how_to_move_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = file.parent / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv("MOSECTL_CACHE", str(blocked))
    with pytest.raises(OutputError) as e:
        open_checkpoint(file)
    assert "MOSECTL_CACHE" in e.value.fix
    monkeypatch.setenv("MOSECTL_CACHE", str(file.parent / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="GB are free") as e:
        open_checkpoint(file)
    assert "MOSECTL_CACHE" in e.value.fix and not any((file.parent / "cache" / "gguf").glob("pico*"))


def test_a_file_without_the_suffix_is_known_by_its_beginning(file: Path) -> None:
    blob = file.rename(file.with_name("sha256-0123"))  # as Ollama stores them
    assert open_checkpoint(blob).model == "sha256-0123"
    (file.parent / "notes.txt").write_text("GG")
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        open_checkpoint(file.parent / "notes.txt")


# Ollama.


def test_the_modelfile_names_both_files(file: Path, tmp_path: Path) -> None:
    patch, beside = patch_for(file), file.parent / "Modelfile"
    export([patch], file, file.parent / "my adapter.gguf", "gguf-lora")
    assert beside.read_text().splitlines()[1:] == ['FROM "./pico.gguf"', 'ADAPTER "./my adapter.gguf"']
    done = export([patch], file, file.parent / "b.gguf", "gguf-lora")
    assert done.modelfile and 'ADAPTER "./b.gguf"' in beside.read_text(), "its own is written anew"
    away = tmp_path / "away" / "c.gguf"
    export([patch], file, away, "gguf-lora")
    assert f'FROM "{file}"' in (tmp_path / "away" / "Modelfile").read_text()


def test_a_modelfile_of_the_users_is_left_alone(file: Path) -> None:
    beside = file.parent / "Modelfile"
    beside.write_text("FROM mine\n")
    with pytest.warns(Notice, match=r"left as it is; what Ollama needs: FROM \"./pico.gguf\" and ADAPTER"):
        done = export([patch_for(file)], file, file.parent / "a.gguf", "gguf-lora")
    assert done.modelfile is None and beside.read_text() == "FROM mine\n" and done.path.exists()


def test_a_name_that_ollama_cannot_read(file: Path) -> None:
    odd = file.rename(file.with_name("a\nFROM b.gguf"))
    with pytest.warns(Notice, match="no Modelfile is written"):
        export([patch_for(odd)], odd, file.parent / "a.gguf", "gguf-lora")
    assert not (file.parent / "Modelfile").exists()


def test_ollama_may_be_told_another_base(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch_for(file).save(tmp_path / "p")
    what = ("export", tmp_path / "p", "--model", file)
    assert run(*what, "--to", "gguf-lora", "-o", tmp_path / "a.gguf", "--ollama", "smollm2:135m") == 0
    assert "for Ollama" in capsys.readouterr().out
    assert 'FROM "smollm2:135m"' in (tmp_path / "Modelfile").read_text()
    assert run(*what, "-o", tmp_path / "lora", "--ollama", "x") == 2
    with pytest.raises(UsageError):
        export([patch_for(file)], file, tmp_path / "x", "onnx", ollama="x")


def test_nothing_is_left_where_the_export_fails(file: Path) -> None:
    patch = patch_for(file)
    other = replace(patch, base={m: replace(t, sha256="0" * 64) for m, t in patch.base.items()})
    with pytest.raises(BaseMismatch):
        export([other], file, file.parent / "a.gguf", "gguf-lora")
    assert [p.name for p in file.parent.iterdir()] == ["pico.gguf"]


# On the Hub.

NAMES = ["pico-Q4_K_M.gguf", "pico-Q8_0.gguf", "mmproj-pico-f16.gguf", "more/pico-IQ4_K_M.gguf"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    from huggingface_hub import constants

    with serving() as (server, address):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server, address


def put(server: Any, repo: str, *names: str) -> str:
    """Files of these names in a new repository, each holding its name; the commit."""
    server.repos[repo] = {}
    return str(server.commit(repo, {"README.md": b"x", **{n: n.encode() for n in names}}))


def test_which_file_of_a_repository_is_taken(hub: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = hub
    monkeypatch.setattr("mosectl.storage.gguf.unpacked", lambda file: file)
    one = put(server, "u/one", "sub/Pico.GGUF", "mmproj-pico.gguf")
    file, name, commit = locate("u/one")
    assert (file.read_text(), name, commit) == ("sub/Pico.GGUF", "u/one/sub/Pico.GGUF", one)
    assert locate("u/one", weights=False)[1] == name, "as in the check before weights are fetched"
    sha = put(server, "u/pico-GGUF", *NAMES, "config.json")
    for asked, wanted in (
        (":Q4_K_M", NAMES[0]), (":q8_0", NAMES[1]), (":IQ4_K_M", NAMES[3]), *((f"/{n}", n) for n in NAMES),
    ):  # fmt: skip
        file, name, commit = locate(f"u/pico-GGUF{asked}")
        assert (file.read_text(), name, commit) == (wanted, f"u/pico-GGUF/{wanted}", sha)
    server.commit("u/pico-GGUF", {NAMES[0]: b"newer"})
    assert locate(f"u/pico-GGUF/{NAMES[0]}", sha)[0].read_text() == NAMES[0], "of the revision that is asked for"
    requests = {path for _, path, _ in server.asked if "resolve" in path}
    assert not any(path.endswith("mmproj-pico.gguf") for path in requests), "what lies beside a model is not fetched"


def test_what_is_said_where_no_file_of_a_repository_can_be_taken(
    hub: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = hub
    monkeypatch.setattr("mosectl.storage.gguf.unpacked", lambda file: pytest.fail(f"{file} is not meant"))
    put(server, "u/pico-GGUF", *NAMES)

    def said(model: str, status: int = 4) -> str:
        assert run("doctor", model) == status
        return " ".join(capsys.readouterr().err.split())

    several = said("u/pico-GGUF")
    assert "holds 3 GGUF files: more/pico-IQ4_K_M.gguf, pico-Q4_K_M.gguf, pico-Q8_0.gguf" in several
    assert "--model u/pico-GGUF/more/pico-IQ4_K_M.gguf" in several
    assert "holds no GGUF file 'Q5', but more/pico" in said("u/pico-GGUF:Q5")
    assert "holds no GGUF file 'pico.gguf', but more/pico" in said("u/pico-GGUF/pico.gguf")
    assert "no such model" in said("u/nowhere-GGUF:Q5") and "no such model" in said("u/nowhere/x.gguf")
    put(server, "u/other", "notes.json")
    assert "no safetensors weights" in said("u/other"), "no GGUF file there: as ever"
    put(server, "u/both-GGUF", "config.json", "model.safetensors", "x.gguf")
    assert "GGUF" not in said("u/both-GGUF").replace("both-GGUF", ""), "its safetensors are the model"
    server.gated.add("u/pico-GGUF")
    assert "gated" in said("u/pico-GGUF:Q8_0", 9)
    assert "no such model folder" in said("a/b/c/d") and "no such model folder" in said("u/../x.gguf")


def test_a_file_in_the_cache_needs_no_hub(hub: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = hub
    monkeypatch.setattr("mosectl.storage.gguf.unpacked", lambda file: file)
    put(server, "u/pico-GGUF", "pico-Q8_0.gguf")
    there = locate("u/pico-GGUF")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("u/pico-GGUF") == locate("u/pico-GGUF:Q8_0") == there
    patch = replace(make(), model=there[1], revision=there[2])
    assert _at_hand(patch, None) == there[0], "what a patch was made for is found there"
    assert cached_model("u/pico-GGUF", there[2]), "whatever of its README"
    with pytest.raises(HubError, match="out of reach"):
        locate("u/other-GGUF:Q8_0")


def test_a_gguf_file_of_the_hub_is_a_model(
    hub: tuple[Any, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pico.gguf", kind="Q8_0")
    server, _ = hub
    server.repos["u/pico-GGUF"] = {}
    sha = server.commit("u/pico-GGUF", {"pico-Q8_0.gguf": (tmp_path / "pico.gguf").read_bytes()})
    assert run("doctor", "u/pico-GGUF:Q8_0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["revision"]) == ("u/pico-GGUF/pico-Q8_0.gguf", sha)
    assert any("read from pico-Q8_0.gguf (Q8_0, F32)" in note for note in found["notes"])
