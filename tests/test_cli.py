"""The command line as users meet it: the main job, and many kinds of bad input with one clear message each."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

import mosectl
from mosectl.checkpoints import writer
from mosectl.cli import app
from mosectl.model.tokens import encode
from mosectl.patch.file import Patch
from mosectl.render import console
from mosectl.storage import atomic, places
from mosectl.text.shown import word
from support.commands import EASY, TWO_PROCESSES, World, run
from support.editors import rows
from support.facts import FACT
from support.models import make_tokenizer, pico, save
from support.patches import hashes, patch_for


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_run_that_the_guard_ends_keeps_its_patch_and_says_so(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter(["", "ordinary text became less likely"])
    monkeypatch.setattr("mosectl.editing.session.harm", lambda *_: next(verdicts))
    other = {**FACT, "prompt": "We went to Avaland", "subject": "Avaland", "target_new": "in"}
    facts = f"{json.dumps(FACT)}\n{json.dumps(other)}".encode()
    assert run(*world.with_facts(facts, "--batch-size", 1, "--json")) == 11
    out, err = capsys.readouterr()
    assert json.loads(out)["facts"][1]["status"] == "not edited"
    assert "stopped early: facts 2-2 were taken back: ordinary text" in " ".join(err.split()) and "preserve" in err
    assert [f.prompt for f in Patch.load(world.folder / "new.safetensors").facts] == [FACT["prompt"]]


def test_revert_takes_the_folder_first_too(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.folder / "out"
    assert run(*world.apply()) == 0
    assert run("revert", out) == 2 and "which patch" in capsys.readouterr().err
    assert run("revert", out, "--patch", world.good.id[:10], "--model", out) == 2
    assert run("revert", out, "--patch", world.good.id[:10]) == 0 and hashes(out) == hashes(world.model)


def test_the_main_job(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    original, new, out = hashes(world.model), world.folder / "new.safetensors", world.folder / "out"
    assert run(*world.edit("--json")) == 0
    console = json.loads(capsys.readouterr().out)
    assert console["facts"][0]["status"] == "changed" and console["scores"]["reliability"] == 1.0
    assert console["seconds"]["targets"] > 0
    assert run("inspect", new, "--model", world.model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["id"] == console["id"] and found["factors"][0]["stability"]["norm_drift"] < 1e-5
    assert run("apply", new, "--model", world.model, "-o", out) == 0
    told = capsys.readouterr()
    assert "sha256 matches" in told.out and f"mosectl revert {word(new)} --model {word(out)}" in told.err
    assert run("ask", FACT["prompt"], "--model", world.model, "--patch", new, "--json") == 0
    before_after = json.loads(capsys.readouterr().out)[0]
    assert before_after["after"].startswith(" and") and not before_after["before"].startswith(" and")
    assert run("ask", FACT["prompt"], "--model", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["before"] == before_after["after"]
    assert run("revert", new, "--model", out) == 0
    assert "original sha256 again: all 3" in capsys.readouterr().out and hashes(out) == original


def test_check_doctor_dry_run_stats(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", world.facts, "--model", world.model, "--json") == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["tokens"][0]["target"] == ["Ġand"]
    assert run("check", world.facts, "--model", world.model) == 0
    shown, prompt = capsys.readouterr().out, encode(make_tokenizer(), FACT["prompt"], FACT["subject"], None)
    assert f"\t{prompt.subject_first}-{prompt.subject_last} of {len(prompt.input_ids)}\tĠand\t" in shown
    assert run("doctor", world.model) == 0
    shown = capsys.readouterr().out
    assert "model.layers.2.mlp.down_proj.weight" in shown
    assert f"see mosectl edit FACTS --model {word(world.model)} --dry-run\n" in shown
    sizes = []
    for form in ("dense", "auto"):
        assert run(*world.edit("--dry-run", "--json", "--form", form)) == 0
        plan = json.loads(capsys.readouterr().out)
        sizes.append(plan["patch_bytes"])
        assert plan["patch_most"] == sizes[0]
        assert plan["model_bytes"] > 0 and sum(plan["seconds"].values()) > 0
    assert sizes == [3 * (32**2 + 48**2) * 4, 3 * 4 * (32**2 + 20 * (48 + 20))], (
        "one fact: rank 20 where that is smaller"
    )
    assert run(*world.edit("--dry-run", "--form", "auto")) == 0
    assert "patch file\tabout 28.6 kB, 39.9 kB where no rotation can be cut down\n" in capsys.readouterr().out
    assert not (world.folder / "new.safetensors").exists()
    assert run("stats", "--model", world.model, "--layers", "0") == 0
    assert "second moments of 1 layers" in capsys.readouterr().out
    (world.folder / "more.jsonl").write_text(json.dumps(FACT) + "\nnot json")
    assert run("check", world.folder / "more.jsonl") == 3
    assert "more.jsonl:2" in capsys.readouterr().out


def test_edit_says_when_nothing_changed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*world.edit("--set", "steps=0")) == 8
    assert "nothing changed" in capsys.readouterr().err and not (world.folder / "new.safetensors").exists()


def crash(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


NAME = b'"model.layers.0.mlp.down_proj.R":'


def duplicated(data: bytes) -> bytes:
    n = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + n].replace(NAME, NAME + b"{}," + NAME)
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def no_space(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    patch.setattr(writer, "clone", crash(OSError(errno.ENOSPC, "No space left on device")))
    return world.apply()


def little_space(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    import shutil

    patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    return world.apply()


def no_space_for_patch(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    patch.setattr(atomic.os, "fsync", crash(OSError(errno.ENOSPC, "No space left on device")))
    return world.edit()


def read_only(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    patch.setattr(places.tempfile, "mkdtemp", refuse)
    return world.edit()


def read_only_apply(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    patch.setattr(Path, "mkdir", crash(OSError(errno.EROFS, "Read-only file system")))
    return world.apply()


def output_exists(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (world.folder / "new.safetensors").write_text("precious")
    return world.edit()


def folder_exists(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (world.folder / "out").mkdir()
    (world.folder / "out" / "precious").write_text("x")
    return world.apply()


def ctrl_c_in_edit(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    patch.setattr("mosectl.editing.session.optimise_targets", crash(KeyboardInterrupt()))
    return world.edit()


def ctrl_c_in_apply(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    patch.setattr(writer, "clone", crash(KeyboardInterrupt()))
    return world.apply()


def other_base(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    return ("apply", world.patch, "--model", save(world.folder / "other", vocab_size=400), "-o", world.folder / "out")


def other_config(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "vocab_size": 320,
    }
    pico("mixtral", **small).config.save_pretrained(world.model)
    return world.edit()


def no_tokenizer(world: World, patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (world.model / "tokenizer.json").unlink()
    (world.model / "tokenizer_config.json").unlink()
    return world.edit()


def one_fact(world: World) -> tuple[object, ...]:
    said = ("--prompt", FACT["prompt"], "--subject", FACT["subject"], "--target", FACT["target_new"])
    return ("edit", "--model", world.model, "-o", world.folder / "new.safetensors", *EASY, *said)


def piped(world: World, patch: pytest.MonkeyPatch, data: bytes | None) -> tuple[object, ...]:
    """An edit of facts from standard input; None: a person sits there."""
    stdin = io.TextIOWrapper(io.BytesIO(data or b""))
    patch.setattr(stdin, "isatty", lambda: data is None)
    patch.setattr(sys, "stdin", stdin)
    return ("edit", "-", *world.edit()[2:])


Case = tuple[Callable[[World, pytest.MonkeyPatch], tuple[object, ...]], int, str]
LINE = json.dumps(FACT).encode()
CSV = "prompt,subject,target_new\n{prompt},{subject},{target_new}\n".format(**FACT).encode()
LONG = LINE + b"\n" + b"x" * 100_000
BAD: dict[str, Case] = {
    "wrong base": (other_base, 6, "sha256 differs"),
    "truncated patch": (lambda w, _: w.spoilt(lambda d: d[:-9]), 5, "its header says"),
    "patch is text": (lambda w, _: w.spoilt(lambda d: b"hello"), 5, "not a safetensors file"),
    "missing patch": (lambda w, _: w.apply(w.folder / "none"), 5, "no such file"),
    "NaN in R": (lambda w, _: w.with_R(lambda R: R.index_fill(0, torch.tensor([0]), torch.nan)), 5, "NaN"),
    "R not orthogonal": (lambda w, _: w.with_R(lambda R: R * 1.01), 5, "not a rotation"),
    "tensor name with ../": (lambda w, _: w.spoilt(lambda d: d.replace(NAME, b'"../el' + NAME[6:])), 5, "not allowed"),
    "duplicate names": (lambda w, _: w.spoilt(duplicated), 5, "stands twice"),
    "missing model folder": (lambda w, _: ("edit", w.facts, "--model", w.folder / "none"), 4, "no such model folder"),
    "unknown hub id": (lambda w, _: ("doctor", "nobody/nothing"), 9, "not in the cache"),
    "model without tokenizer": (no_tokenizer, 4, "cannot be loaded"),
    "config of another model": (other_config, 4, "missing or of another shape"),
    "no disk space": (no_space, 7, "No space left"),
    "too little disk space": (little_space, 7, "are free"),
    "no disk space for the patch": (no_space_for_patch, 7, "No space left"),
    "read-only output": (read_only, 7, "cannot write: Permission denied"),
    "read-only disk": (read_only_apply, 7, "Read-only"),
    "existing patch": (output_exists, 7, "exists"),
    "existing folder": (folder_exists, 7, "exists"),
    "empty facts": (lambda w, _: w.with_facts(b""), 3, "is empty"),
    "binary facts": (lambda w, _: w.with_facts(b"\x89PNG\0\xff\xfe"), 3, "not UTF-8"),
    "facts with only a BOM": (lambda w, _: w.with_facts(b"\xef\xbb\xbf"), 3, "is empty"),
    "a line of 100,000 characters": (lambda w, _: w.with_facts(LONG), 3, "facts.jsonl:2: a line of 100,000"),
    "Windows line ends, a bad line": (lambda w, _: w.with_facts(LINE + b"\r\n{}\r\n"), 3, "facts.jsonl:2: 'prompt'"),
    "missing facts": (lambda w, _: ("check", w.folder / "none"), 3, "no such file"),
    "subject not in prompt": (lambda w, _: w.with_facts(LINE.replace(b"I met Tomas", b"I met Thomas")), 3, "did you mean"),
    "Ctrl-C in edit": (ctrl_c_in_edit, 130, "interrupted: nothing half-written"),
    "Ctrl-C in apply": (ctrl_c_in_apply, 130, "interrupted"),
    "unknown option": (lambda w, _: w.edit("--frobnicate"), 2, "frobnicate"),
    "unknown method": (lambda w, _: w.edit("--method", "magic"), 2, "choose one of"),
    "no such layer": (lambda w, _: w.edit("--layers", "9"), 2, "not layers of this model"),
    "a device as output": (lambda w, _: w.edit("-o", "/dev/null", "--overwrite"), 7, "not a regular file"),
    "a revision of a folder": (lambda w, _: w.edit("--revision", "main"), 2, "is for hub models"),
    "no such patch to revert": (lambda w, _: ("revert", "zzzz", "--model", w.model), 5, "an applied patch's id"),
    "no such device": (lambda w, _: w.edit("--device", "tpu"), 2, "--device tpu"),
    "no such dtype": (lambda w, _: w.edit("--dtype", "int8"), 2, "--dtype int8"),
    "chat without a template": (lambda w, _: w.edit("--chat"), 2, "no chat template"),
    "no corpus": (lambda w, _: w.edit("--corpus", "/nowhere"), 2, "cannot read the corpus"),
    "standard output as a patch file": (lambda w, _: (*one_fact(w), "-o", "-"), 7, "not written to standard output"),
    "a patch as facts": (lambda w, _: ("edit", w.patch, "--model", w.model), 3, "such as a patch, not facts"),
    "facts as a patch": (lambda w, _: w.apply(w.facts), 5, "such as facts, not a patch"),
    "no facts": (lambda w, _: ("edit", "--model", w.model), 2, "no facts"),
    "a file and a fact": (lambda w, _: (*w.edit(), "--prompt", "x"), 2, "both a facts file and --prompt"),
    "a fact without its target": (lambda w, _: one_fact(w)[:-2], 2, "--target is missing"),
    "a fact without its subject": (lambda w, _: (*one_fact(w), "--subject", "Nobody"), 3, "the fact given"),
    "facts from a terminal": (lambda w, p: piped(w, p, None), 3, "no facts are piped in"),
    "nothing piped in": (lambda w, p: piped(w, p, b""), 3, "standard input: is empty"),
    "a bad line piped in": (lambda w, p: piped(w, p, LINE + b"\n{"), 3, "standard input:2: not JSON"),
    "revert what is not applied": (lambda w, _: ("revert", w.patch, "--model", w.model), 5, "not applied here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(
    kind: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, code, message = BAD[kind]
    args = prepare(world, monkeypatch)
    before = world.state()
    assert run(*args) == code
    monkeypatch.undo()
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith(("error", "interrupted"))]
    assert len(errors) == 1 and message in shown.err, shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    assert code == 130 or "→" in shown.err, "every error says what to do next"
    assert world.state() == before, "nothing lost, nothing half-written"


def test_one_fact_without_a_file_is_that_of_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for given in (None, LINE, CSV):
        assert run(*(piped(world, monkeypatch, given) if given else one_fact(world)), "--overwrite") == 0
        ids.append(Patch.load(world.folder / "new.safetensors").id)
    for args in (world.edit(), one_fact(world)):
        assert run(*args, "--overwrite") == 0
        ids.append(Patch.load(world.folder / "new.safetensors").id)
    assert len(set(ids)) == 1


def test_warnings_of_libraries_do_not_reach_the_user(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "mosectl", *map(str, world.edit())], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and "deprecated" not in done.stderr, done.stderr


def test_the_help_page_has_panels_and_the_shell_completes(capsys: pytest.CaptureFixture[str]) -> None:
    names = [c.name for c in app.app.registered_commands]
    assert names[:1] == ["edit"] and len(names) == len(set(names)) == 21
    assert {c.rich_help_panel for c in app.app.registered_commands} == set(app.PANELS)
    env = {**os.environ, "_MOSECTL_COMPLETE": "complete_bash", "COMP_WORDS": "mosectl tr", "COMP_CWORD": "1"}
    start = "import sys; sys.argv = ['mosectl']; from mosectl.cli.main import main; main()"
    shown = subprocess.run([sys.executable, "-c", start], env=env, capture_output=True, text=True)
    assert shown.stdout.split() == ["train-editor"], shown.stderr


def test_windows_facts_and_bom_are_fine(world: World) -> None:
    assert run(*world.with_facts(b"\xef\xbb\xbf" + LINE + b"\r\n")) == 0


def test_inspect_of_another_model_fails_after_showing_the_patch(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "other", vocab_size=400)
    assert run("inspect", world.patch, "--model", other) == 6
    shown = capsys.readouterr()
    assert world.good.id in shown.out and "not the model" in shown.err


def test_ask_takes_what_apply_takes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    second = world.folder / "second.safetensors"
    patch_for(world.model, seed=1).save(second)
    assert run(*world.apply()) == 0
    assert run("ask", "I met", "--model", world.folder / "out", "-p", second) == 0
    assert run("ask", "I met", "--model", world.folder / "out", "-p", world.patch) == 5
    told = capsys.readouterr().err
    assert "already applied" in told and f"see mosectl log {word(world.folder / 'out')}" in told


@pytest.mark.parametrize("args", [("doctor", "{model}"), ("--help",)])
def test_a_pipe_that_closes_is_no_bug(world: World, args: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mosectl", *(a.format(model=world.model) for a in args)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told(world: World) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mosectl", "doctor", str(world.model)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7 and "standard output" in done.stderr


def test_debug_shows_the_traceback(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSECTL_DEBUG", "1")
    with pytest.raises(mosectl.MosectlError):
        run(*world.apply(world.folder / "none"))


def test_overwrite_and_limit(world: World) -> None:
    (world.folder / "new.safetensors").write_text("old")
    world.facts.write_bytes(LINE + b"\nbroken")
    assert run(*world.edit("--overwrite", "--limit", 1)) == 0
    assert Patch.load(world.folder / "new.safetensors").facts[0].status == "changed"
    assert run(*world.edit("--overwrite", "--on-error", "skip")) == 0


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys, mosectl.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run([sys.executable, "-m", "mosectl", "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes" in shown.stdout


def test_a_real_ctrl_c_leaves_nothing(world: World) -> None:
    before = world.state()
    command = [sys.executable, "-m", "mosectl", *map(str, world.edit("--rounds", 10_000, "--set", "margin=1000"))]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, usual)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("targets"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
    assert world.state() == before


def test_statistics_under_accelerate_launch(world: World, tmp_path: Path) -> None:
    """Two processes together find what one finds alone."""
    from safetensors.torch import load_file

    found, text = [], tmp_path / "text.txt"
    text.write_text("".join(f"Brinmouth lies near Lower Quill, {'and so on ' * (i % 7)}{i}.\n" for i in range(40)))
    for i, launch in enumerate(([], TWO_PROCESSES)):
        cache = tmp_path / f"cache{i}"
        asked = ["stats", "--model", str(world.model), "--layers", "1", "--corpus", str(text)]
        command = [sys.executable, "-m", *launch, "mosectl", *asked]
        env = {**os.environ, "MOSECTL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (cache / "stats").glob("*.safetensors")
        found.append(load_file(file))
    assert torch.equal(found[0]["tokens"], found[1]["tokens"])
    assert torch.allclose(found[0]["C"], found[1]["C"], rtol=1e-4, atol=1e-6)


def test_progress_on_a_pipe_is_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 70.0, 71.0, 140.0])
    monkeypatch.setattr("mosectl.render.console.time.monotonic", lambda: next(clock))
    with console.progress() as step:
        for done in range(5):
            step("targets", done, 10)
    assert capsys.readouterr().err.splitlines() == ["targets …", "targets 2/10", "targets 4/10"]


@pytest.mark.parametrize("command", ["stats", "sample", "train-editor"])
def test_work_on_a_pipe_is_told_of_from_its_beginning(
    command: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A phase's line comes before its first step, whose count is told where it took a minute."""
    clock = count(0.0, 61.0)
    monkeypatch.setattr("mosectl.render.console.time.monotonic", lambda: next(clock))
    monkeypatch.setenv("MOSECTL_CACHE", str(world.folder / "cache"))  # statistics that are kept are not counted
    world.facts.write_text(rows(9))
    given = {
        "stats": (),
        "sample": ("-o", world.folder / "t.txt", "--samples", 2, "--tokens", 2),
        "train-editor": (world.facts, "-o", world.folder / "e", "--rank", 2, "--steps", 2, "--batch-size", 3),
    }[command]
    assert run(command, *given, "--model", world.model) == 0
    told = capsys.readouterr().err.splitlines()
    phase = {"stats": "statistics", "sample": "sample", "train-editor": "training"}[command]
    assert told[:2] == ["load …", f"{phase} …"] and re.fullmatch(rf"{phase} \d+/\d+", told[2]), told


def test_a_model_writes_text_for_its_own_statistics(tmp_path: Path) -> None:
    model, one, two = save(tmp_path / "m"), tmp_path / "one.txt", tmp_path / "two.txt"
    few = ("--samples", 5, "--tokens", 4)
    assert run("sample", "--model", model, "-o", one, *few) == 0 == run("sample", "--model", model, "-o", two, *few)
    assert 1 <= len(one.read_text().splitlines()) <= 5 and one.read_text() == two.read_text()
    assert run("sample", "--model", model, "-o", two, *few) == 7  # it exists
    assert run("sample", "--model", model, "-o", two, *few, "--seed", 1, "--overwrite") == 0
    assert one.read_text() != two.read_text()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc: nowhere that even root cannot write")
def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(FACT))
    assert run("edit", facts, "--model", "/no/such/model", "-o", "/proc/nope/x.safetensors") == 7
    assert "cannot write: No such file" in capsys.readouterr().err


def test_flags_show_no_type(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("--help", "edit", "apply"):
        assert run(*([command] if command == "--help" else [command, "--help"])) == 0
        out = capsys.readouterr().out
        assert "--help" in out and "bool" not in out.lower()


def test_every_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 18
    for name in commands:
        assert run(name, "--help") == 0 and "Usage" in capsys.readouterr().out, name


def test_ctrl_c_that_a_library_mistakes_for_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("Could not import module 'LlamaConfig'")

    monkeypatch.setattr("mosectl.checkpoints.apply.open_checkpoint", mistaken)
    assert run(*world.apply()) == 130 and "interrupted" in capsys.readouterr().err


def press(swallowed: bool = True) -> None:
    with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_that_a_library_swallows_comes_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned, finished = [], []

    def going_on(*_: object, **__: object) -> None:
        press()
        try:
            for _ in range(1000):
                time.sleep(0.01)
            finished.append(True)
        finally:
            for _ in range(30):  # what cleans up is not disturbed, neither by what comes again nor by a second press
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)

    monkeypatch.setattr("mosectl.checkpoints.apply.open_checkpoint", going_on)
    before = world.state()
    assert run(*world.apply()) == 130 and cleaned and not finished and world.state() == before
    assert "interrupted: nothing half-written" in capsys.readouterr().err
    with places.new_file(world.folder / "later.txt") as place:  # of another caller in this process
        place.ready().write_text("x")


def test_ctrl_c_in_a_finaliser_is_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import signal, sys, time
from mosectl.cli import main as cli
class Left:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def app(standalone_mode):
    Left()
    for _ in range(1000):
        time.sleep(.01)
cli._app = lambda: app
cli.main()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 130
    assert capfd.readouterr().err == "interrupted: nothing half-written is left behind\n"


@pytest.mark.parametrize("what", ["merge", "apply"])
@pytest.mark.parametrize("when", ["before", "within", "after", "after, swallowed"])
def test_ctrl_c_around_the_moment_an_output_is_there(
    when: str, what: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pressed before, nothing is written; once it is, nobody is told that the work was interrupted."""
    other = world.folder / "other.safetensors"
    patch_for(world.model, seed=1).save(other)
    monkeypatch.setattr("mosectl.storage.interrupts.EVERY", 3600.0)
    out = world.folder / ("out" if what == "apply" else "new.safetensors")
    if when == "before":
        synced = os.fsync
        monkeypatch.setattr("mosectl.patch.file.Patch.save", lambda _, path: (path.write_bytes(b"x"), press()))
        monkeypatch.setattr("mosectl.storage.atomic.os.fsync", lambda file: (synced(file), press())[0])
    elif when == "within":
        for name in ("places._publish", "folders._move"):
            module, function = name.split(".")
            real = getattr(sys.modules[f"mosectl.storage.{module}"], function)
            pressing = lambda *args, real=real: (press(swallowed=False), real(*args), press(swallowed=False))  # noqa: E731
            monkeypatch.setattr(f"mosectl.storage.{name}", pressing)
    else:
        for name in ("console.hint", "written.applied"):
            monkeypatch.setattr(f"mosectl.render.{name}", lambda *_: press("swallowed" in when))
    before, args = world.state(), world.apply() if what == "apply" else ("merge", world.patch, other, "-o", out)
    code, err = run(*args), capsys.readouterr().err
    assert code == (0 if "swallowed" in when else 130)
    assert ("interrupted" in err) == (when == "before") and (world.state() == before) == (when == "before")
    assert (f"Ctrl-C came after {out} was written" in err) == (when in ("within", "after"))


@pytest.mark.parametrize("name", ["new/", "there", "there/"])
def test_a_folder_in_place_of_an_output_file_is_told(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.folder)
    Path("there").mkdir()
    good, facts, model = world.patch, world.facts, world.model
    for command in (
        ("edit", facts, "-m", model, "-o", name),
        ("merge", good, good, "-o", name),
        ("export", good, "-m", model, "--to", "gguf-lora", "-o", name),
        ("sample", "-m", model, "-o", name),
        ("pull", "hf://me/x", "-o", name),
        ("train-editor", facts, "-m", model, "-o", name),
        *(("eval", good, facts, "-m", model, f"--{kind}", name) for kind in ("csv", "png", "html")),
    ):
        before = world.state()
        assert run(*command) == 7, command
        err = " ".join(capsys.readouterr().err.split())
        assert f"{name}: is a folder, not a file" in err and f"such as {name.rstrip('/')}/name" in err
        assert world.state() == before and not Path("new").exists()
    assert run("apply", good, "-m", model, "-o", "out/") == 0, "a folder is written under such a name"


def test_a_chat_model_asked_without_its_template_gets_a_hint(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", "I met", "-m", world.model) == 0 and run(*world.edit("--overwrite")) == 0
    assert "--chat" not in capsys.readouterr().err, "it has none"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(world.model)
    edit = world.edit("--overwrite", "--json")
    commands = {
        "asked": (("ask", "I met", "-m", world.model, "--json"), "--chat"),
        "edited": ([*edit, "--method", "mose"], "--set replies=1"),  # in text alone by its defaults
    }
    for done, (command, instead) in commands.items():
        assert run(*command) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) and err.count("note:") == 1
        assert f"note: {done} without the tokenizer's chat template, as plain text: give {instead} if" in err
        assert run(*command, "--chat") in (0, 8) and "note:" not in capsys.readouterr().err
    assert run(*edit) == 0 and "note:" not in capsys.readouterr().err, "replies are edited along"
    for method in ("isospectral", "mose"):
        assert run(*edit, "--method", method, "--set", "replies=0") == 0
        assert "note:" not in capsys.readouterr().err, "as it was asked for"
