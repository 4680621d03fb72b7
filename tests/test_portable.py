"""As on Windows: no fcntl, resource, alarms, owners, exchanges, reflinks, synced folders (support/elsewhere.py)."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
import types
from pathlib import Path

import pytest

from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.audit import verify
from mosectl.cli import main as cli
from mosectl.errors import OutputError, UsageError
from mosectl.measure.sandbox import bounded
from mosectl.model import chat_worker
from mosectl.model.tokens import render_chat
from mosectl.patch.file import Patch
from mosectl.storage import folders, locks, places
from mosectl.storage.atomic import append, exclusive
from mosectl.storage.folders import claimed, new_folder, recovered
from mosectl.storage.locks import locked
from support.models import LOOP, make_tokenizer, save
from support.patches import hashes, patch_for
from support.paths import ROOT

ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def mosectl(*args: object) -> tuple[int, str]:
    """The exit code of the whole command line, and what it has told."""
    told = io.StringIO()
    sys.argv = ["mosectl", *map(str, args)]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli.main()
        except SystemExit as e:
            return int(e.code or 0), " ".join(told.getvalue().split())
    raise AssertionError("main() has not ended")


def other(command: str, *args: object) -> subprocess.Popen[str]:
    """Another process of such a system."""
    needs = "import support.elsewhere, os, sys; from pathlib import Path; from mosectl.storage.locks import locked"
    return subprocess.Popen(
        [sys.executable, "-c", f"{needs}\n{command}", *map(str, args)],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def only(folder: Path, *expected: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)


# Run in a process that has imported support/elsewhere.py.


def case_it_is_another_system(_: Path) -> None:
    assert sys.modules["fcntl"] is None and not hasattr(os, "O_NOFOLLOW")
    assert not places.renameat2(Path("a"), Path("b"), places.EXCHANGE)


def case_patches_are_read_and_saved(folder: Path) -> None:
    demo = ROOT / "patches" / "demo.safetensors"
    patch = Patch.load(demo)
    code, told = mosectl("inspect", demo)
    assert code == 0 and patch.id[:8] in told
    for _ in range(2):  # new, and over one
        patch.save(folder / "p.safetensors")
    assert Patch.load(folder / "p.safetensors").id == patch.id
    only(folder, "p.safetensors")


def case_patches_are_merged(folder: Path) -> None:
    base = save(folder / "base")
    for layer in (1, 2):
        patch_for(base, (layer,), seed=layer).save(folder / str(layer))
    merge = ("merge", folder / "1", folder / "2", "-o", folder / "m")
    assert (done := mosectl(*merge))[0] == 0, done
    assert (done := mosectl(*merge))[0] == 7 and "exists" in done[1]
    assert (done := mosectl(*merge, "--overwrite"))[0] == 0, done
    assert len(Patch.load(folder / "m").changes) == 2
    only(folder, "base", "1", "2", "m")


def case_a_patch_is_applied_and_taken_back(folder: Path) -> None:
    base = save(folder / "base", shard="20KB")
    a, b = patch_for(base), patch_for(base, seed=1)
    (folder / "empty").mkdir()
    for name, copy in (("out", False), ("copy", True), ("empty", False)):
        apply([a, b], base, folder / name, copy=copy)
        assert all(c.ok for c in verify(folder / name)) and hashes(folder / name) != hashes(base)
    assert hashes(folder / "copy") == hashes(folder / "out") == hashes(folder / "empty")
    assert mosectl("revert", a.id[:8], "--model", folder / "out")[0] == 0
    assert revert(b, folder / "out").restored and hashes(folder / "out") == hashes(base)
    with pytest.raises(OutputError, match="exists"):
        apply([a], base, folder / "copy")
    only(folder, "base", "out", "copy", "empty")


def case_a_kill_within_an_exchange_is_mended(folder: Path) -> None:
    base, out = save(folder / "base"), folder / "out"
    patch = patch_for(base)
    apply([patch], base, out)
    state, rename = hashes(out), Path.rename

    def killed(self: Path, to: Path) -> Path:
        if self.name == places.NEW:
            os._exit(9)
        return rename(self, to)

    child = os.fork()
    if not child:
        Path.rename = killed  # type: ignore[method-assign,assignment]
        revert(patch, out)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not out.exists()
    recovered(out)
    assert hashes(out) == state
    only(folder, "base", "out")
    assert revert(patch, out).restored and hashes(out) == hashes(base)


def case_what_a_kill_leaves_is_gone_on_with(folder: Path) -> None:
    left = places.private_folder(folder / "out")
    (left / "new").mkdir()
    (left / "new" / "shard").write_text("x")
    (left / folders.PLAN).write_text("the plan")
    (left / folders.DONE).write_text('"shard"')
    with claimed(folder / "out"), folders.built(folder / "out", plan="the plan") as new:
        assert (new / "shard").read_text() == "x"
    only(folder, "out")


def case_a_second_writer_is_refused(folder: Path) -> None:
    base, out = save(folder / "base"), folder / "out"
    patch_for(base).save(folder / "p")
    with other(
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read(); os._exit(9)", out
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        code, told = mosectl("apply", folder / "p", "--model", base, "-o", out)
        assert code == 7 and "another mosectl process is writing there" in told
        assert not out.exists()
        holder.kill()
    code, told = mosectl("apply", folder / "p", "--model", base, "-o", out)
    assert code == 0, f"a killed process's lock is free: {told}"
    with locked(out), pytest.raises(OutputError, match=r"another mosectl.*\n.*delete .*\.pid"), locked(out):
        pass
    only(folder, "base", "out", "p")


def case_of_many_writers_one_at_a_time(folder: Path) -> None:
    (folder / "count").write_text("0")
    line = """
from mosectl.errors import OutputError
done = 0
while done < 20:
    try:
        with locked(Path(sys.argv[1])):
            count = int(Path(sys.argv[2]).read_text())
            Path(sys.argv[2]).write_text(str(count + 1))
            done += 1
    except OutputError as e:
        assert 'another mosectl process' in str(e), e
"""
    writers = [other(line, folder / "out", folder / "count") for _ in range(3)]
    for writer in writers:
        _, told = writer.communicate(timeout=100)
        assert writer.returncode == 0, told
    assert (folder / "count").read_text() == "60"
    only(folder, "count")


def case_links_and_pipes_are_no_way_in(folder: Path) -> None:
    from support import elsewhere

    victim, lock = folder / "victim", folder / ".o.mosectl.lock"
    for name in (lock, folder / ".o.mosectl.lock.pid", folder / "log"):
        name.symlink_to(victim)
    with pytest.raises(OutputError, match="link"), locked(folder / "o"):
        pass
    with pytest.raises(OutputError, match="link"):
        append(folder / "log", b"x")
    with pytest.raises(OSError), exclusive(folder / "log"):
        pass
    lock.unlink()
    with pytest.raises(OutputError, match="another mosectl process"), locked(folder / "o"):
        pass
    elsewhere.mkfifo(folder / ".q.mosectl.lock")
    with pytest.raises(OutputError, match="no lock"), locked(folder / "q"):
        pass
    assert not victim.exists()


def case_a_template_ends_in_time(_: Path) -> None:
    for template in (LOOP, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(UsageError, match="takes longer than 3 s"):
            render_chat(make_tokenizer(chat_template=template), "Hi")
    assert render_chat(make_tokenizer(chat_template="[{{ messages[0].content }}]"), "Hi") == "[Hi]"
    with bounded():  # nothing is bounded here, and nothing fails
        pass


CASES = [name for name in dir() if name.startswith("case_")]


def main(folder: Path) -> None:
    failed = {}
    for name in CASES:
        (folder / name).mkdir()
        try:
            globals()[name](folder / name)
        except BaseException:
            failed[name] = traceback.format_exc()
    Path(folder / "failed.json").write_text(json.dumps(failed), "utf-8")


@pytest.fixture(scope="session")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What fails there, with its traceback."""
    if sys.platform != "linux":
        pytest.skip("simulated on Linux")
    folder = tmp_path_factory.mktemp("elsewhere")
    env = {**ENV, "MOSECTL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    line = """
import torch._dynamo, transformers.models.llama.modeling_llama  # their parts for Linux need what is to be taken away
import support.elsewhere, sys, pathlib, test_portable
test_portable.main(pathlib.Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", line, str(folder)], env=env, text=True, capture_output=True)
    assert (folder / "failed.json").exists(), done.stderr[-3000:]
    return json.loads((folder / "failed.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_elsewhere(case: str, failed: dict[str, str]) -> None:
    assert case not in failed, failed[case]


# Here.


def test_a_lock_goes_where_no_open_file_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Path.unlink, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        status = self.stat()
        for n in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(n.name)), status):
                    seen.append(n.name)
                    raise PermissionError(errno.EACCES, "in use", str(self))
        real(self, missing_ok)

    monkeypatch.setattr(locks.sys, "platform", "win32")
    monkeypatch.setattr(Path, "unlink", unlink)
    with locked(tmp_path / "o"):
        only(tmp_path, ".o.mosectl.lock")
    only(tmp_path)
    assert seen, "what is tested has happened"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(error, "no locks here")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with locked(tmp_path / "o"):
        with pytest.raises(OutputError, match="another mosectl process"), locked(tmp_path / "o"):
            pass
        assert all(places.OWN.fullmatch(p.name) for p in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2
    only(tmp_path)


@pytest.mark.parametrize("swap", [True, False])
def test_macos_renames_with_flags(swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    libc = types.SimpleNamespace(renamex_np=lambda *a: (calls.append(a), 0 if swap else -1)[1])
    monkeypatch.setattr(places.sys, "platform", "darwin")
    monkeypatch.setattr(places.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(places.ctypes, "get_errno", lambda: errno.ENOTSUP if len(calls) == 1 else errno.EEXIST)
    a, b = tmp_path / "a", tmp_path / "b"
    assert places.renameat2(a, b, places.EXCHANGE) == swap and calls == [(os.fsencode(a), os.fsencode(b), 2)]
    with contextlib.nullcontext() if swap else pytest.raises(FileExistsError):
        assert places.renameat2(a, b, places.NOREPLACE)
    assert calls[1][2] == 4


def test_a_worker_that_nobody_waits_for_ends_itself() -> None:
    asked = json.dumps({"template": LOOP, "messages": [], "variables": {}})
    worker = subprocess.Popen(
        [sys.executable, "-P", chat_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    worker.communicate(asked.encode() + b"\n", timeout=60)
    assert worker.returncode == 1


def test_an_empty_folder_is_taken_where_renames_go_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if to.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(to))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "o").mkdir()
    with new_folder(tmp_path / "o") as folder:
        (folder / "x").touch()
    only(tmp_path, "o")
    with pytest.raises(OutputError, match="exists"), new_folder(tmp_path / "p") as folder:
        shutil.copytree(tmp_path / "o", tmp_path / "p")
    only(tmp_path, "o", "p")
