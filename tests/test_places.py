"""Writing a file: the lock, the private place, what a stranger or another process has put in the way, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# A module that is first imported while a test has patched what it imports by name would keep the patch.
import mosectl.bench.runner
import mosectl.checkpoints.audit
import mosectl.checkpoints.conflicts
import mosectl.measure.evaluate  # noqa: F401
from mosectl.checkpoints.export import export
from mosectl.errors import Notice, OutputError
from mosectl.model import generation
from mosectl.patch.file import Patch
from mosectl.storage import folders, places
from mosectl.storage.atomic import append, write_bytes
from mosectl.storage.places import leftovers, locked, new_file
from support.commands import World, run
from support.models import save
from support.patches import patch_for


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_file_is_there_at_the_end_and_not_before(tmp_path: Path) -> None:
    with new_file(tmp_path / "sub" / "x") as place:
        write_bytes(place.ready(), b"1")
        assert not (tmp_path / "sub" / "x").exists()
        assert stat.S_IMODE(place.file.parent.parent.stat().st_mode) == 0o700
    assert (tmp_path / "sub" / "x").read_bytes() == b"1" and names(tmp_path / "sub") == {"x"}
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "new" / "deep" / "x"):
        raise KeyboardInterrupt
    assert names(tmp_path) == {"sub"}, "folders made for nothing are removed"


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "links"])
def test_what_appears_meanwhile_is_kept_and_the_work_too(
    flags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flags:
        monkeypatch.setattr(places, "renameat2", lambda *_: False)
    out = tmp_path / "p.safetensors"
    with pytest.raises(OutputError, match="in the meantime") as e, new_file(out) as place:
        write_bytes(place.ready(), b"ours")
        out.write_bytes(b"theirs")
    assert out.read_bytes() == b"theirs"
    (spare,) = names(tmp_path) - {"p.safetensors"}
    assert spare in e.value.fix and (tmp_path / spare).read_bytes() == b"ours" and spare.endswith(".safetensors")


def test_a_disk_without_links_or_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(places, "renameat2", lambda *_: False)
    monkeypatch.setattr(os, "link", refuse)
    with new_file(tmp_path / "a") as place:
        place.ready().write_text("1")
    with pytest.raises(OutputError), new_file(tmp_path / "b") as place:
        place.ready().write_text("2")
        (tmp_path / "b").symlink_to("nowhere")
    assert (tmp_path / "a").read_text() == "1" and (tmp_path / "b").is_symlink()


def test_an_edit_does_not_overwrite_what_appears_while_it_computes(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.folder / "new.safetensors"

    class Result:
        patch = world.good

    def compute(*_: object, **__: object) -> Result:
        out.write_text("precious")
        return Result()

    monkeypatch.setattr("mosectl.editing.edit.edit", compute)
    assert run(*world.edit()) == 7
    assert out.read_text() == "precious" and "the result is in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "command", ["edit", "merge", "pull", "sample", "train-editor", "bench", "apply", "lora", "gguf"]
)
def test_a_second_start_is_refused_before_its_work(
    command: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = world.folder / "o", world.model
    (world.folder / "bench.yaml").write_text(
        f"models: [{model}]\ndatasets: [{{facts: {world.facts}}}]\nruns: [{{edits: 1}}]\nmethods: [{{name: memit}}]\n"
    )
    args: dict[str, tuple[object, ...]] = {
        "edit": world.edit("-o", out),
        "merge": ("merge", world.patch, "-o", out),
        "pull": ("pull", "me/none", "-o", out),
        "sample": ("sample", "--model", model, "-o", out),
        "train-editor": ("train-editor", world.facts, "--model", model, "-o", out),
        "bench": ("bench", world.folder / "bench.yaml", "-o", out),
        "apply": ("apply", world.patch, "--model", model, "-o", out, "--allow-conflicts"),
        "lora": ("export", world.patch, "--model", model, "-o", out),
        "gguf": ("export", world.patch, "--model", model, "-o", out, "--to", "gguf-lora"),
    }
    for work in (
        "mosectl.model.loading.load",
        "mosectl.checkpoints.apply.open_checkpoint",
        "mosectl.checkpoints.export.open_checkpoint",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it has begun"))
    with locked(out / "results.jsonl" if command == "bench" else out):
        assert run(*args[command]) == 7
    assert "another mosectl process is writing there" in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir())


def test_a_lock_is_no_way_in(tmp_path: Path) -> None:
    out, lock, victim = tmp_path / "o", tmp_path / ".o.mosectl.lock", tmp_path / "victim"
    lock.symlink_to(victim)
    with pytest.raises(OutputError, match="cannot write") as e, locked(out):
        pass
    assert "link" in e.value.fix and not victim.exists() and lock.is_symlink()
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OutputError, match="no lock"), locked(out):
        pass
    lock.unlink()
    with locked(out):
        assert lock.exists()
    assert not lock.exists()
    if os.geteuid() == 0:
        lock.touch()
        os.chown(lock, 65534, 65534)
        with pytest.raises(OutputError, match="another user's"), locked(out):
            pass
        assert lock.exists()


def test_gguf_does_not_write_through_a_planted_link(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base, victim = save(tmp_path / "base"), tmp_path / "precious"
    victim.write_text("precious")
    (tmp_path / ".a.gguf.tmp").symlink_to(victim)
    export([patch_for(base)], base, tmp_path / "a.gguf", "gguf-lora")
    assert victim.read_text() == "precious" and (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")
    (tmp_path / "b.gguf").symlink_to(tmp_path / "new")
    with pytest.raises(OutputError, match="exists"):
        export([patch_for(base)], base, tmp_path / "b.gguf", "gguf-lora")
    assert not (tmp_path / "new").exists()


def test_results_are_not_added_to_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_text("precious")
    (tmp_path / "results.jsonl").symlink_to(victim)
    with pytest.raises(OutputError, match="cannot write") as e:
        append(tmp_path / "results.jsonl", b"{}\n")
    assert "link" in e.value.fix and victim.read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError):
        append(tmp_path / "pipe", b"{}\n")


def test_left_overs_are_removed_if_they_are_ours(tmp_path: Path) -> None:
    dead = tmp_path / ".o.abcdefg1.mosectl.tmp"
    (dead / "new").mkdir(parents=True)
    (dead / "new").chmod(0o500)
    (tmp_path / ".o.0123abcd.tmp").write_text("half")
    (tmp_path / ".o.progress.0123abcd.tmp").write_text("half")
    kept = {".other.0123abcd.tmp", ".o.notes.tmp", "o.0123abcd.tmp"}
    for name in kept:
        (tmp_path / name).write_text("the user's")
    if os.geteuid() == 0:
        kept.add(".o.stranger.mosectl.tmp")
        (tmp_path / ".o.stranger.mosectl.tmp").mkdir()
        os.chown(tmp_path / ".o.stranger.mosectl.tmp", 65534, 65534)
    with new_file(tmp_path / "o") as place:
        place.ready().write_text("x")
    assert names(tmp_path) == {"o", *kept}


def test_the_mode_of_what_is_replaced_stays(world: World) -> None:
    second = world.folder / "second"
    patch_for(world.model, (2,), seed=1).save(second)
    out = world.folder / "m.safetensors"
    out.write_bytes(b"old")
    out.chmod(0o600)
    if hasattr(os, "setxattr"):
        os.setxattr(out, "user.note", b"mine")
    if os.geteuid() == 0:
        os.chown(out, 65534, 65534)
    assert run("merge", world.patch, second, "-o", out, "--overwrite") == 0
    assert len(Patch.load(out).changes) == 3 and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert os.geteuid() != 0 or out.stat().st_uid == 65534
    assert not hasattr(os, "getxattr") or os.getxattr(out, "user.note") == b"mine"
    world.good.save(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@pytest.mark.parametrize("command", ["edit", "merge", "apply", "sample", "revert"])
def test_a_name_too_long_is_told(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.folder / ("x" * 300)
    args: dict[str, tuple[object, ...]] = {
        "edit": world.edit("-o", out),
        "merge": ("merge", world.patch, "-o", out),
        "apply": ("apply", world.patch, "--model", world.model, "-o", out),
        "sample": ("sample", "--model", world.model, "-o", out),
        "revert": ("revert", world.patch, "--model", world.model, "-o", out),
    }
    assert run(*args[command]) == 7
    assert "File name too long" in capsys.readouterr().err


def test_a_name_as_long_as_can_be(world: World) -> None:
    out, second = world.folder / ("x" * 255), world.folder / "second"
    patch_for(world.model, (2,), seed=1).save(second)
    assert run("merge", world.patch, second, "-o", out) == 0 and len(Patch.load(out).changes) == 3
    folder = world.folder / ("y" * 255)
    assert run("apply", world.patch, "--model", world.model, "-o", folder) == 0
    assert run("revert", world.good.id[:8], "--model", folder) == 0
    assert names(world.folder) == {"model", "facts.jsonl", "p.safetensors", "second", out.name, folder.name}


def test_other_names_that_cannot_be(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError, match="null"), new_file(world.folder / "a\0b"):
        pass
    assert run("merge", world.patch, "-o", "/") == 7 and run("merge", world.patch, "-o", world.facts / "x") == 7
    assert run("apply", world.patch, "--model", world.model, "-o", "/") == 7
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_met_before_the_work(
    small_disk: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []
    monkeypatch.setattr("mosectl.editing.edit.edit", lambda *_, **__: begun.append("edit"))
    monkeypatch.setattr(generation, "own_text", lambda *_, **__: begun.append("sample"))
    monkeypatch.setattr("mosectl.editing.plan._planned", lambda *_: ((0,), 5 * 10**6))
    assert run(*world.edit("-o", small_disk / "p")) == 7 and "are free" in capsys.readouterr().err
    assert run("sample", "--model", world.model, "-o", small_disk / "s", "--samples", 10_000, "--tokens", 64) == 7
    (small_disk / "full").write_bytes(b"x" * int(3.5 * 2**20))
    for command in (("merge", world.patch), ("export", world.patch, "--model", world.model)):
        assert run(*command, "-o", small_disk / "x") == 7
    assert not begun and names(small_disk) == {"full"}


def test_what_is_held_keeps_others_off_the_disk(small_disk: Path) -> None:
    with new_file(small_disk / "p") as place:
        place.reserve(2 * 2**20)
        with pytest.raises(OSError):
            (small_disk / "other").write_bytes(b"x" * 2**21)
        (small_disk / "other").unlink()
        place.ready().write_bytes(b"y" * 2**21)
    assert (small_disk / "p").stat().st_size == 2**21


def test_a_disk_that_holds_nothing_is_asked_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    with new_file(tmp_path / "p") as place:
        place.reserve(1000)
        place.ready().write_text("x")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="are free"), new_file(tmp_path / "q"):
        pass
    assert names(tmp_path) == {"p"}


def test_left_overs_are_told_from_one_anothers(tmp_path: Path) -> None:
    for name in (
        ".a.0123abcd.tmp",
        ".a.b.0123abcd.tmp",
        ".a.abcdefgh.mosectl.tmp",
        ".a.mosectl.tmp",
        ".ab.0123abcd.tmp",
    ):
        (tmp_path / name).touch()
    assert [p.name for p in leftovers(tmp_path / "a")] == [
        ".a.0123abcd.tmp",
        ".a.abcdefgh.mosectl.tmp",
        ".a.mosectl.tmp",
    ]


def test_what_a_command_reads_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    patch, other, facts, text = (tmp_path / n for n in ("p.safetensors", "q.safetensors", "f.jsonl", "t.txt"))
    for path, seed in ((patch, 1), (other, 2)):
        patch_for(model, seed=seed).save(path)
    facts.write_text('{"prompt": "Ava is", "subject": "Ava", "target_new": "Oz"}')
    text.write_text("A text.")
    (tmp_path / "link.safetensors").symlink_to(patch)
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for command in (
        ("edit", facts, "-m", model, "-o", facts),
        ("edit", facts, "-m", model, "-o", model / "model.safetensors"),
        ("edit", facts, "-m", model, "--corpus", text, "-o", text),
        ("merge", patch, other, "-o", other),
        ("merge", patch, other, "-o", tmp_path / "link.safetensors"),
        ("sample", "-m", model, "-o", model / "config.json"),
        ("train-editor", facts, "-m", model, "-o", facts),
        ("eval", patch, facts, "-m", model, "--csv", facts),
        ("eval", patch, facts, "-m", model, "--html", tmp_path / "model" / "tokenizer.json"),
    ):
        assert run(*command, "--overwrite") == 7, command
        assert "this command reads: it would be lost" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole


def test_a_folder_that_is_made_for_an_output_is_told_of(tmp_path: Path) -> None:
    tmp_path = tmp_path.resolve()
    with pytest.warns(Notice, match="made the folder") as told, places.new_file(tmp_path / "a" / "b" / "x") as place:
        place.ready().write_text("x")
    assert [str(w.message) for w in told] == [f"made the folder {tmp_path / 'a' / 'b'}, which was not there"]
    with pytest.warns(Notice, match="made the folder") as told, folders.new_folder(tmp_path / "c" / "model"):
        pass
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with places.new_file(tmp_path / "a" / "y") as place:  # it is there
            place.ready().write_text("x")
        with locked(tmp_path / "results" / "x.jsonl", tmp_path / "results"):  # it is what was asked for
            pass
        with pytest.raises(KeyError), places.new_file(tmp_path / "d" / "y"):  # and gone again
            raise KeyError
    assert not (tmp_path / "d").exists()
