"""What of a model folder is carried over, linked, copied, followed or left out; what it may do; what kills leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mosectl.checkpoints import writer
from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.export import export
from mosectl.errors import ModelError, Notice, OutputError, PatchError
from mosectl.patch.file import Patch
from mosectl.storage import folders, places
from mosectl.storage.atomic import like
from mosectl.storage.checkpoint import open_checkpoint
from mosectl.storage.folders import built, claimed, recovered
from support.models import save
from support.patches import hashes, patch_for


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Killed(BaseException):
    """What a SIGKILL looks like from inside, with nothing cleaned up afterwards."""


# In place.


def mine(folder: Path) -> dict[str, str]:
    """Things of the user's in an edited folder."""
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("an object")
    (folder / ".git" / "objects" / "ab").chmod(0o444)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("cached")
    (folder / "mosectl" / "notes.md").write_text("why I did this")
    (folder / "empty").mkdir()
    (folder / "here.txt").symlink_to("config.json")
    (folder / "gone.txt").symlink_to("/nowhere/at/all")
    (folder / ".mosectl-plan").write_text("not one of ours")
    os.mkfifo(folder / "pipe")
    return {n: (folder / n).read_text() for n in (".git/objects/ab", ".cache/x", "mosectl/notes.md", ".mosectl-plan")}


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_revert_in_place_keeps_what_it_did_not_put_there(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = save(tmp_path / "base", shard="20KB"), tmp_path / "out"
    a, b = patch_for(base), patch_for(base, seed=1)
    apply([a, b], base, out)
    texts = mine(out)
    before = names(out)
    (out / "mosectl" / ".x.safetensors.0123abcd.tmp").write_text("half of a killed apply")
    inode = (out / ".git" / "objects" / "ab").stat().st_ino
    if not links:
        monkeypatch.setattr(folders.os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
        (out / "pipe").unlink()
        before.remove("pipe")
    revert(a, out)
    assert names(out) == before - {f"mosectl/{a.id}.safetensors"}
    assert {n: (out / n).read_text() for n in texts} == texts
    assert (
        (out / "here.txt").is_symlink() and (out / "gone.txt").is_symlink() and mode(out / ".git/objects/ab") == 0o444
    )
    assert ((out / ".git" / "objects" / "ab").stat().st_ino == inode) == links, "moved, however large it is"
    assert (out / "config.json").stat().st_nlink == 1
    assert revert(b, out).restored and hashes(out) == hashes(base)
    assert {n: (out / n).read_text() for n in texts} == texts
    assert names(out) - names(base) == before - names(base) - {n for n in before if n.startswith("mosectl")} | {
        "mosectl",
        "mosectl/notes.md",
    }
    assert not list(tmp_path.glob(".out*"))


def test_a_journal_cannot_name_the_users_files(tmp_path: Path) -> None:
    """Only what lies in mosectl/ is taken away on the journal's word."""
    base, out = save(tmp_path / "base"), tmp_path / "out"
    patch = patch_for(base)
    apply([patch], base, out)
    journal = json.loads((out / "mosectl.json").read_text())
    (out / journal["patches"][0]["file"]).rename(out / "precious.safetensors")
    journal["patches"][0]["file"] = "precious.safetensors"
    (out / "mosectl.json").write_text(json.dumps(journal))
    with contextlib.suppress(ModelError):  # such a journal may be refused
        revert(patch, out)
    assert (out / "precious.safetensors").exists()


def test_modes_owners_and_attributes_in_place(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    a, b = patch_for(base), patch_for(base, seed=1)
    apply([a, b], base, out)
    files = [out / "model.safetensors", out / "mosectl.json", out / "mosectl" / "base.safetensors"]
    files += [out / "mosectl" / f"{b.id}.safetensors", out / "mosectl", out]
    for file in files:
        file.chmod(0o700 if file.is_dir() else 0o640)
        if os.geteuid() == 0:
            os.chown(file, 65534, 65533)
        if hasattr(os, "setxattr"):
            os.setxattr(file, "user.note", file.name.encode())
    revert(a, out)
    for file in files:
        assert mode(file) == (0o700 if file.is_dir() else 0o640), file
        assert os.geteuid() != 0 or (file.stat().st_uid, file.stat().st_gid) == (65534, 65533), file
        assert not hasattr(os, "getxattr") or os.getxattr(file, "user.note") == file.name.encode()


def test_rights_of_users_that_it_does_not_belong_to_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    (tmp_path / "a").chmod(0o4755)
    monkeypatch.setattr(os, "chown", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not you")))
    like(tmp_path / "a", tmp_path / "b")
    assert mode(tmp_path / "b") == 0o755


# To a new folder.


def test_private_weights_stay_private(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    for file in base.iterdir():
        file.chmod(0o600)
    base.chmod(0o700)
    out = tmp_path / "out"
    apply([patch_for(base)], base, out)
    assert mode(out) == 0o700
    assert {mode(f) for f in out.rglob("*") if f.is_file()} == {0o600}
    revert(patch_for(base), out, tmp_path / "back")
    assert {mode(f) for f in (tmp_path / "back").iterdir()} == {0o600}


READ_ONLY = """
import sys, warnings
from mosectl import apply, revert
from mosectl import Patch
patch = Patch.load("p.safetensors")
apply([patch], "base", "out")
assert revert(patch, "out").restored
"""


def test_a_read_only_model_folder(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    patch_for(base).save(tmp_path / "p.safetensors")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    (base / "original").chmod(0o555)
    for file in base.iterdir():
        file.chmod(0o555 if file.is_dir() else 0o444)
    base.chmod(0o555)
    # Root may write anywhere, but for this capability.
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("no setpriv: cannot give up root's right to write anywhere")
    command = [*drop, sys.executable, "-c", READ_ONLY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert hashes(tmp_path / "out") == hashes(base) and not list(tmp_path.glob(".out*"))
    assert mode(tmp_path / "out") == 0o755 and mode(tmp_path / "out" / "original") == 0o755
    assert mode(tmp_path / "out" / "config.json") == 0o644


def test_a_read_only_folder_is_not_reverted_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    apply([patch_for(base)], base, out)
    monkeypatch.setattr(folders.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="read-only") as e:
        revert(patch_for(base), out)
    assert "give -o" in e.value.fix


def test_what_cannot_be_read_is_not_called_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base")
    (base / "closed").mkdir()
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(folders.os, "scandir", scandir)
    with pytest.raises(ModelError, match="cannot be read: Permission denied") as e:
        apply([patch_for(base)], base, tmp_path / "out")
    assert "closed" in e.value.where and "you may write to" not in e.value.fix


def test_links_pipes_and_devices_are_left_out(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    (tmp_path / "secret").write_text("secret")
    (base / "sub").mkdir()
    for name, to in {
        "secret.txt": tmp_path / "secret", "self": Path(), "sub/up": Path(".."), "zero": Path("/dev/zero"),
        "a": Path("b"), "b": Path("a"), "gone": Path("/nowhere"),
    }.items():  # fmt: skip
        (base / name).symlink_to(to)
    os.mkfifo(base / "pipe")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(base / "sock"))  # a path may have about 100 bytes
    (base / "same.json").symlink_to("config.json")
    with pytest.warns(Notice, match="left out: a, b, gone, …, being no regular file"):
        apply([patch_for(base)], base, out)
    assert names(out) - names(base) == {"mosectl.json"} | {n for n in names(out) if n.startswith("mosectl")}
    assert names(base) - names(out) == {"secret.txt", "self", "sub/up", "zero", "a", "b", "gone", "pipe", "sock"}
    assert not (out / "same.json").is_symlink()
    assert (out / "same.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_that_are_links_out_of_the_folder(name: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    (base / name).rename(tmp_path / name)
    (base / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match="leads out of the model's folder") as e:
        apply([patch], base, tmp_path / "out")
    assert name in e.value.where and not (tmp_path / "out").exists()


def cached(home: Path, name: str = "models--me--pico", **how: object) -> Path:
    """A model as the Hub's cache keeps it: links into a folder of blobs. Returns the snapshot."""
    plain, repo = save(home / "plain", **how), home / name  # type: ignore[arg-type]
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "sub").mkdir(parents=True)
    for i, file in enumerate(sorted(plain.iterdir())):
        file.rename(repo / "blobs" / str(i))
        (repo / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{i}")
    (repo / "snapshots" / "abc" / "sub" / "x.json").symlink_to("../../../blobs/0")
    return repo / "snapshots" / "abc"


def test_a_hub_cache_is_followed_and_its_blobs_are_linked(tmp_path: Path) -> None:
    snapshot, out = cached(tmp_path, shard="20KB"), tmp_path / "out"
    patch = patch_for(snapshot, (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        done = apply([patch], snapshot, out)
    shards = list(out.glob("*.safetensors"))
    assert sum(f.stat().st_nlink == 2 for f in shards) == len(shards) - 1 and not any(p.is_symlink() for p in shards)
    assert done.bytes_written < sum(f.stat().st_size for f in shards)
    assert (out / "config.json").stat().st_nlink == 1 and (out / "sub" / "x.json").is_file()
    assert revert(patch, out).restored and hashes(out) == hashes(snapshot)


def test_another_models_blobs_are_not_followed(tmp_path: Path) -> None:
    other, snapshot = cached(tmp_path / "x", "models--me--private"), cached(tmp_path / "y")
    (snapshot / "stolen.json").symlink_to(other / "config.json")
    with pytest.warns(Notice, match="left out: stolen.json"):
        apply([patch_for(snapshot)], snapshot, tmp_path / "out")


def test_copies_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base", shard="20KB")
    patch, size = patch_for(base, (0,)), sum(f.stat().st_size for f in base.iterdir())
    (base / "pytorch.bin").write_bytes(b"x" * 10**6)
    usage = shutil._ntuple_diskusage(10**9, 0, 2**20 + size)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="are free"):
        apply([patch], base, tmp_path / "out")
    (base / "pytorch.bin").unlink()
    apply([patch], base, tmp_path / "out")
    usage = shutil._ntuple_diskusage(10**9, 0, 2**20 + size // 2)  # type: ignore[attr-defined]
    monkeypatch.setattr(folders.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "another disk")))
    with pytest.raises(OutputError, match="are free"):
        apply([patch], base, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_named_checkpoint_is_exported(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    for name in ("checkpoint", "new", "applied"):
        (base / name).mkdir()
        (base / name / "x").write_text(name)
    export([patch_for(base)], base, tmp_path / "merged", "merged")
    for name in ("checkpoint", "new", "applied"):
        assert (tmp_path / "merged" / name / "x").read_text() == name
    assert "mosectl.json" not in names(tmp_path / "merged")


def test_a_model_that_changes_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, real = save(tmp_path / "base", shard="20KB"), writer._records

    def records(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        for file in base.glob("*.safetensors"):
            os.utime(file)

    monkeypatch.setattr(writer, "_records", records)
    with pytest.raises(ModelError, match="changed while it was read"):
        apply([patch_for(base)], base, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Ids.


def test_ids_that_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids that agree in 64 bits, as somebody can make them: both patches are kept, and either comes off."""
    base = save(tmp_path / "base")
    a, b = patch_for(base), patch_for(base, seed=1)
    monkeypatch.setattr("mosectl.patch.file.content_id", _alike)
    apply([a, b], base, tmp_path / "out")
    assert a.id[:16] == b.id[:16] and a.id != b.id
    assert len(list((tmp_path / "out" / "mosectl").glob("*.safetensors"))) == 3
    with pytest.raises(PatchError, match="2 patches begin with") as e:
        revert(a.id[:16], tmp_path / "out")
    assert "more digits" in e.value.fix
    revert(a.id, tmp_path / "out")
    assert revert(b, tmp_path / "out").restored and hashes(tmp_path / "out") == hashes(base)


def _alike(record: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name, x in sorted(tensors.items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return "ab" * 8 + digest.hexdigest()[16:]


def test_a_folder_with_names_of_16_digits_is_read(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    a, b = patch_for(base), patch_for(base, seed=1)
    apply([a, b], base, out)
    journal = json.loads((out / "mosectl.json").read_text())
    for p in journal["patches"]:
        old = f"mosectl/{p['id'][:16]}.safetensors"
        (out / p["file"]).rename(out / old)
        p["file"] = old
    (out / "mosectl.json").write_text(json.dumps(journal))
    (out / f"mosectl/{b.id[:16]}.safetensors").chmod(0o600)
    revert(a, out)
    assert names(out / "mosectl") == {"base.safetensors", f"{b.id}.safetensors"}
    assert mode(out / "mosectl" / f"{b.id}.safetensors") == 0o600
    assert revert(b, out).restored and not (out / "mosectl").exists()


def test_what_was_written_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base")
    other = patch_for(base, seed=5)
    monkeypatch.setattr(writer, "patch_file", lambda _: "mosectl/same.safetensors")
    with pytest.raises(PatchError, match="not what was written"):
        apply([patch_for(base), other], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# After a kill.


def left_behind(patches: list[Patch], base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, shards: int = 2) -> Path:
    """A process killed while it builds ``out``, after so many shards; its private folder."""
    marks: list[str] = []
    mark = writer._mark

    def stop(folder: Path, shard: str, tensors: object) -> None:
        mark(folder, shard, tensors)  # type: ignore[arg-type]
        marks.append(shard)
        if len(marks) == shards:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(writer, "_mark", stop)
        m.setattr(folders, "remove", lambda _: None)
        with pytest.raises(Killed):
            apply(patches, base, out)
    (left,) = places.leftovers(out)
    return left


def test_nothing_of_a_killed_start_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base", shard="20KB"), tmp_path / "out"
    patch = patch_for(base, (0, 1, 2))
    left = left_behind([patch], base, out, monkeypatch)
    (left / "new" / "mosectl").mkdir(exist_ok=True)
    (left / "new" / "mosectl" / ".x.0123abcd.tmp").write_text("half")
    (left / "new" / "config.json.half").write_text("half")
    done = apply([patch], base, out)
    assert sum(t.note == "written by the start before" for t in done.tensors) == 2
    assert names(out) == names(base) | {
        "mosectl.json",
        "mosectl",
        "mosectl/base.safetensors",
        f"mosectl/{patch.id}.safetensors",
    }
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("at", ["an edited tensor", "another tensor"])
def test_finished_shards_are_hashed_again(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base", shard="20KB"), tmp_path / "out"
    patch = patch_for(base, (0, 1, 2))
    apply([patch], base, tmp_path / "whole")
    left = left_behind([patch], base, out, monkeypatch, shards=1)
    shard = next(f for f in sorted((left / "new").glob("*.safetensors")) if f.stat().st_nlink == 1)
    data = bytearray(shard.read_bytes())
    where = open_checkpoint(base).tensors
    inside = [
        e for n, e in where.items() if e.file.name == shard.name and ("down_proj" in n) == (at == "an edited tensor")
    ]
    data[inside[0].start] ^= 1
    shard.write_bytes(bytes(data))
    done = apply([patch], base, out)
    assert not any(t.note == "written by the start before" for t in done.tensors)
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("what", ["others may enter", "a link", "another user's"])
def test_a_prepared_folder_is_not_gone_on_with(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base", shard="20KB"), tmp_path / "out"
    patch = patch_for(base, (0, 1, 2))
    left = left_behind([patch], base, out, monkeypatch)
    if what == "others may enter":
        left.chmod(0o777)
    elif what == "a link":
        left.rename(tmp_path / "elsewhere")
        left.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(left, 65534, 65534)
    else:
        pytest.skip("only root can give a folder away")
    done = apply([patch], base, out)
    assert not any(t.note == "written by the start before" for t in done.tensors)
    assert left.exists() == (what == "another user's"), "what is not ours is left alone"
    assert (tmp_path / "elsewhere" / "new").exists() == (what == "a link"), "a link is removed, not what it leads to"


def test_our_names_in_a_strangers_folder_are_not_taken_over(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    (base / "sub").mkdir()
    ours = [".mosectl-plan", ".mosectl-done", ".x.mosectl.tmp", ".x.mosectl.lock", "sub/.y.0123abcd.tmp"]
    for name in ours:
        (base / name).write_text("planted")
    (base / ".z.abcdefgh.mosectl.tmp").mkdir()
    (base / ".z.abcdefgh.mosectl.tmp" / "done").write_text("planted")
    apply([patch_for(base)], base, out)
    assert names(base) - names(out) == {*ours, ".z.abcdefgh.mosectl.tmp", ".z.abcdefgh.mosectl.tmp/done"}


def test_an_output_inside_the_model_folder(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    before = names(base)
    apply([patch_for(base)], base, base / "out")
    assert names(base / "out") >= before and not (base / "out" / "out").exists()


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_an_exchange_without_renameat2_is_recovered(kill: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    a, b = patch_for(base), patch_for(base, seed=1)
    apply([a, b], base, out)
    mine(out)
    before, state = names(out), hashes(out)
    calls: list[int] = []
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        calls.append(1)
        if len(calls) == kill:
            raise Killed
        done = real(self, to)
        if len(calls) == kill - 1 == 2:
            raise Killed
        return done

    monkeypatch.setattr(folders, "renameat2", lambda *_: False)
    with monkeypatch.context() as m:
        m.setattr(folders, "_exchange", lambda new, path: (rename(path, new.with_name("old")), rename(new, path)))
        m.setattr(folders, "remove", lambda _: None)
        with pytest.raises(Killed):
            revert(a, out)
    assert out.exists() == (kill != 2)
    if kill == 2:
        other = tmp_path / "edit"
        with places.new_file(other) as place:
            place.ready().touch()
        with places.locked(out), pytest.raises(OutputError, match="another mosectl process"):
            revert(a, out)
        recovered(out)
        assert names(out) == before and hashes(out) == state
        assert not list(tmp_path.glob(".out*"))
    if kill == 3:
        with pytest.raises(PatchError, match="not applied here"):
            revert(a, out)
    else:
        revert(a, out)
    assert revert(b, out).restored and hashes(out) == hashes(base) and not list(tmp_path.glob(".out*"))
    assert (out / ".git" / "objects" / "ab").exists()


def test_every_command_finds_a_folder_that_a_kill_left_nowhere(tmp_path: Path) -> None:
    from mosectl.checkpoints.audit import verify

    base, out = save(tmp_path / "base"), tmp_path / "out"
    apply([patch_for(base)], base, out)
    left = places.private_folder(out)
    (left / "new").mkdir()
    out.rename(left / "old")
    assert all(c.ok for c in verify(out)) and not list(tmp_path.glob(".out*"))


def test_what_was_replaced_is_kept_where_there_is_another_now(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = places.private_folder(out)
    (left / "new").mkdir()
    (left / "old").mkdir()
    (left / "old" / "precious").write_text("x")
    for replace in (False, True):
        out.mkdir(exist_ok=True)
        with pytest.warns(Notice, match="is what out was before"), claimed(out, replace=replace), built(out) as folder:
            (folder / "x").touch()
        shutil.rmtree(out)
        with places.new_file(out) as place:
            place.ready().touch()
        out.unlink()
        assert (left / "old" / "precious").exists()


def test_an_exchange_that_fails_puts_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    apply([patch_for(base)], base, out)
    state, real = hashes(out), Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return real(self, to)

    monkeypatch.setattr(folders, "renameat2", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="Input/output"):
        revert(patch_for(base), out)
    assert hashes(out) == state and not list(tmp_path.glob(".out*"))


def test_an_empty_folder_is_taken_with_its_rights(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    out.mkdir(0o700)
    apply([patch_for(base)], base, out)
    assert mode(out) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        apply([patch_for(base)], base, tmp_path / "link")


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_folder_that_appears_meanwhile_is_kept(there: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists"), claimed(out), built(out) as folder:
        (folder / "x").touch()
        out.touch() if there == "file" else (out / "precious").mkdir(parents=True)
    assert out.is_file() or (out / "precious").exists()
    assert not list(tmp_path.glob(".out*"))
