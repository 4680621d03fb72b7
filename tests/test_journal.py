"""What is believed of an edited folder: its journal only as far as its patches say so, and no base from afar unasked."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.audit import blame, history, verify
from mosectl.checkpoints.base_tensors import BaseTensors, out_of_reach
from mosectl.checkpoints.conflicts import before_applying
from mosectl.checkpoints.journal import read_journal
from mosectl.errors import BaseMismatch, ModelError, MosectlError, Notice
from mosectl.measure.evaluate import evaluate_edit
from mosectl.patch.fingerprint import sha256
from mosectl.storage.checkpoint import open_checkpoint
from mosectl.storage.hub import cached_model
from support.commands import run
from support.json_mutations import fuzzing, mutated
from support.models import save
from support.patches import hashes, patch_for

NAME = "model.layers.0.mlp.down_proj.weight"
FACT = {"prompt": "The capital of Avaland is", "subject": "Avaland", "target_new": "Plum"}


class Folder:
    """An edited folder, its base and its patch."""

    def __init__(self, tmp_path: Path, dtype: torch.dtype = torch.float32, made: torch.dtype = torch.float32) -> None:
        self.tmp, self.base, self.out = tmp_path, tmp_path / "base", tmp_path / "out"
        save(tmp_path / "made", dtype=made)
        AutoModelForCausalLM.from_pretrained(save(self.base), dtype=dtype).save_pretrained(self.base)
        self.patch = patch_for(tmp_path / "made")
        apply([self.patch], self.base, self.out)
        self.journal: dict[str, Any] = json.loads((self.out / "mosectl.json").read_text())
        self.whole = {f: f.read_bytes() for f in self.out.rglob("*") if f.is_file()}

    def write(self, **changed: Any) -> None:
        (self.out / "mosectl.json").write_text(json.dumps({**self.journal, **changed}))

    def untouched(self) -> bool:
        """But for the journal, which the test has altered."""
        rest = {f: data for f, data in self.whole.items() if f.name != "mosectl.json"}
        return all(f.is_file() and f.read_bytes() == data for f, data in rest.items())

    def lie(self) -> None:
        """Kept base, weights and journal altered together: all hashes are right, and the patch gives just these weights."""
        other = self.tmp / "other"
        shutil.copytree(self.base, other)
        tensors = load_file(other / "model.safetensors")
        tensors[NAME] = tensors[NAME] + 0.5
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        shutil.rmtree(self.out)
        apply([self.patch], other, self.out, force=True)
        self.journal = {**json.loads((self.out / "mosectl.json").read_text()), "base_path": str(self.base)}
        self.write()
        self.whole = {f: f.read_bytes() for f in self.out.rglob("*") if f.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def wrong(folder: Path, base: Path | None = None) -> list[str]:
    return [c.what for c in verify(folder, base=base) if c.ok is False]


# Entries that are missing, or too many


def spoilt(folder: Folder, how: str) -> None:
    tensors = dict(folder.journal["tensors"])
    if how == "missing":
        del tensors[NAME]
    else:
        tensors["model.norm.weight"] = tensors[NAME]
    folder.write(tensors=tensors)


@pytest.mark.parametrize("how", ["missing", "too many"])
def test_the_journal_names_just_what_the_patches_edit(how: str, folder: Folder) -> None:
    spoilt(folder, how)
    match = "it is not in the journal" if how == "missing" else "no stored patch edits it"
    other = patch_for(folder.base, seed=7)
    refused: list[Callable[[], object]] = [
        lambda: revert(folder.patch, folder.out),
        lambda: revert(folder.patch, folder.out, force=True),
        lambda: revert(folder.patch, folder.out, folder.tmp / "new"),
        lambda: apply([other], folder.out, folder.tmp / "new"),
        lambda: before_applying([other], folder.out),
        lambda: history(folder.out),
        lambda: blame(["x"], folder.out),
        lambda: evaluate_edit(folder.out, [FACT]),
        lambda: evaluate_edit(other, [FACT], model=folder.out),
    ]
    for act in refused:
        with pytest.raises(ModelError, match=match) as e:
            act()
        assert e.value.where.endswith("mosectl.json") and e.value.fix
    assert folder.untouched() and not (folder.tmp / "new").exists()
    assert "mosectl.json" in wrong(folder.out)


def test_the_command_line_keeps_what_it_cannot_restore(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt(folder, "missing")
    assert run("revert", folder.patch.id[:12], "-m", folder.out) == 4
    told = capsys.readouterr()
    assert NAME in told.err and "restored" not in told.out and folder.untouched()
    assert run("verify", folder.out) == 4 and "WRONG" in capsys.readouterr().out


# A journal that is wrong in itself


def test_a_base_that_the_patch_was_not_made_for(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.lie()
    assert wrong(folder.out) == ["mosectl.json"], "the patch knows its base"
    assert len(wrong(folder.out, folder.base)) == 2, "and a base that is given is compared"
    other = patch_for(folder.base, seed=7)
    refused: list[Callable[[], object]] = [
        lambda: revert(folder.patch, folder.out),
        lambda: apply([other], folder.out, folder.tmp / "new"),
        lambda: evaluate_edit(folder.out, [FACT]),
    ]
    for act in refused:
        with pytest.raises(BaseMismatch, match="not the one that patch") as e:
            act()
        assert NAME in e.value.where and "--force" in e.value.fix
    with pytest.raises(BaseMismatch, match="is not the base this model was edited from"):
        revert(folder.patch, folder.out, base=folder.base, force=True)
    for look in (lambda: history(folder.out), lambda: blame(["x"], folder.out)):
        with pytest.warns(Notice, match=f"{NAME}: its base is not the one"):
            look()
    assert folder.untouched()
    assert (
        run("verify", folder.out, "--base", folder.base) == 4 and "not what the journal says" in capsys.readouterr().out
    )
    assert run("revert", folder.patch.id[:12], "-m", folder.out) == 6 and folder.untouched()
    assert revert(folder.patch, folder.out, force=True).restored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype_the_fingerprint_tells(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = Folder(tmp_path, dtype)
    assert not wrong(folder.out) and not wrong(folder.out, folder.base)
    folder.lie()
    assert wrong(folder.out) == ["mosectl.json"]
    with pytest.raises(BaseMismatch, match="not the one that patch"):
        revert(folder.patch, folder.out)


def test_a_weight_that_only_a_later_patch_edits(folder: Folder) -> None:
    """Made on top of another, a patch still knows the base of what the other leaves alone."""
    later = patch_for(folder.out, layers=(2,), seed=3)
    later = type(later)(**{**vars(later), "parents": (folder.patch.id,)})
    apply([later], folder.out, folder.tmp / "both")
    assert not wrong(folder.tmp / "both")
    journal = json.loads((folder.tmp / "both" / "mosectl.json").read_text())
    journal["tensors"][NAME.replace("0", "2")]["base_sha256"] = "0" * 64
    (folder.tmp / "both" / "mosectl.json").write_text(json.dumps(journal))
    with pytest.raises(BaseMismatch, match=later.id[:12]):
        revert(later, folder.tmp / "both")


def test_a_given_base_is_never_passed_over(folder: Folder, tmp_path: Path) -> None:
    other = save(tmp_path / "third", vocab_size=400)
    with pytest.raises(BaseMismatch, match="is not the base"):
        revert(folder.patch, folder.out, base=other)
    with pytest.raises(BaseMismatch, match="is not the base"):
        blame(["x"], folder.out, base=other)
    with pytest.raises(ModelError, match="no such model folder"):
        verify(folder.out, base=tmp_path / "no" / "where")
    assert wrong(folder.out, other)[0].startswith("2 edited tensors in") and folder.untouched()
    (folder.out / "mosectl" / "base.safetensors").write_bytes(b"damaged")
    folder.base.rename(tmp_path / "moved")
    journal = read_journal(folder.out)
    assert journal and not list(BaseTensors(open_checkpoint(folder.out), journal).models())
    assert revert(folder.patch, folder.out, base=tmp_path / "moved").restored
    assert hashes(folder.out) == hashes(tmp_path / "moved")


def test_the_kept_base_is_only_read_where_it_fits(folder: Folder) -> None:
    kept = folder.out / "mosectl" / "base.safetensors"
    huge = {"dtype": "F32", "shape": [2**20, 2**12], "data_offsets": [0, 2**34]}
    raw = json.dumps({NAME: huge}).encode()
    with kept.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 2**34)  # 17 GB of nothing
    start = time.perf_counter()
    assert wrong(folder.out) == ["mosectl/base.safetensors"]
    assert revert(folder.patch, folder.out, folder.tmp / "a").restored, "from where the journal says the base is"
    kept.unlink()
    os.mkfifo(kept)
    assert wrong(folder.out) == ["mosectl/base.safetensors"]
    assert time.perf_counter() - start < 5


# Places far away


class Hub:
    """What was asked of the Hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
        self.asked: list[tuple[str, str | None]] = []

        def fetch(repo: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str]:
            self.asked.append((repo, revision))
            return base, "c" * 40

        monkeypatch.setattr("mosectl.storage.hub.fetch_model", fetch)
        monkeypatch.setattr("mosectl.storage.checkpoint.fetch_model", fetch, raising=False)


@pytest.mark.parametrize("place", [{"base_path": "me/model"}, {"model": "me/model", "revision": "c" * 40}])
def test_a_base_on_the_hub_is_told_and_not_fetched(
    place: dict[str, str], folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.base.rename(folder.tmp / "moved")
    hub = Hub(monkeypatch, folder.tmp / "moved")
    folder.write(**place, kept_base=False)
    (folder.out / "mosectl" / "base.safetensors").unlink()
    (folder.out / "model.safetensors").touch()  # later than the journal
    said = "the base is out of reach: it is me/model"
    notes = [c.note for c in verify(folder.out) if c.ok is None]
    assert len(notes) == 3 and all(n.startswith(said) and "--base me/model fetches it" in n for n in notes)
    with pytest.raises(BaseMismatch, match=said):
        blame(["x"], folder.out)
    with pytest.warns(Notice, match=said):
        assert evaluate_edit(folder.out, [FACT]).subject.base is None
    done = revert(folder.patch, folder.out, folder.tmp / "a")
    assert not done.restored and said in done.tensors[0].note
    history(folder.out)
    apply([patch_for(folder.tmp / "moved", layers=(2,))], folder.out, folder.tmp / "b")
    with pytest.raises(BaseMismatch, match=said):
        apply([patch_for(folder.tmp / "moved", layers=(1,))], folder.out, folder.tmp / "c")
    assert not hub.asked
    assert run("verify", folder.out) == 0 and said in " ".join(capsys.readouterr().out.split()) and not hub.asked

    if "model" in place:
        assert all(c.ok for c in verify(folder.out, base="me/model"))
        assert revert(folder.patch, folder.out, folder.tmp / "d", base="me/model").restored
        assert set(hub.asked) == {("me/model", "c" * 40)}, "in the revision that the journal has"


def test_a_base_in_the_local_cache_is_used(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = "c" * 40
    cache = folder.tmp / "cache" / "models--me--model"
    (cache / "snapshots").mkdir(parents=True)
    folder.base.rename(cache / "snapshots" / sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.tmp / "cache"))
    hub = Hub(monkeypatch, folder.tmp)
    folder.write(model="me/model", revision=sha, kept_base=False)
    (folder.out / "mosectl" / "base.safetensors").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert all(c.ok for c in verify(folder.out))
    assert revert(folder.patch, folder.out).restored and not hub.asked
    assert cached_model("me/model", "d" * 40) is None and cached_model("../x/y", sha) is None


class Moved:
    """An edited folder that keeps no base tensors, its base folder, and the same model in the Hub's local cache."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp, self.base, self.out, sha = tmp_path, save(tmp_path / "base"), tmp_path / "out", "c" * 40
        self.patch = patch_for(self.base)
        apply([self.patch], self.base, self.out, keep_base=False)
        self.cached = tmp_path / "cache" / "models--me--model" / "snapshots" / sha
        shutil.copytree(self.base, self.cached)
        self.true = shutil.copytree(self.base, tmp_path / "true")
        self.original = hashes(self.true)
        journal = json.loads((self.out / "mosectl.json").read_text())
        (self.out / "mosectl.json").write_text(json.dumps({**journal, "model": "me/model", "revision": sha}))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        self.hub = Hub(monkeypatch, tmp_path)

    def found(self, **given: Path) -> None:
        """Every command finds the true base."""
        _, (blamed,) = blame(["x"], self.out, **given)
        assert len(blamed.answers) == 2
        assert evaluate_edit(self.out, [FACT], **given).subject.base
        other = patch_for(self.true, seed=7)
        apply([other], self.out, self.tmp / "both", **given)
        assert {c.kind for c in before_applying([other], self.out, ask=True)} == {"order"}
        assert revert(self.patch, self.out, self.tmp / "back", **given).restored
        assert hashes(self.tmp / "back") == self.original and not self.hub.asked


def change(folder: Path, *names: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file({n: t + 0.5 if n in names else t for n, t in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("name", [NAME, "model.norm.weight"])
def test_where_the_base_folder_has_changed_another_place_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(tmp_path, monkeypatch)
    change(moved.base, name)
    assert all(c.ok for c in verify(moved.out))
    moved.found()


def test_one_place_may_have_what_another_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(tmp_path, monkeypatch)
    change(moved.base, NAME)
    change(moved.cached, NAME.replace("0", "1"))
    checks = verify(moved.out)
    assert [c.what for c in checks if not c.ok] == ["28 other tensors"] and not wrong(moved.out)
    moved.found()


def test_a_base_that_is_given_is_the_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(tmp_path, monkeypatch)
    change(moved.base, NAME)
    refused: list[Callable[[], object]] = [
        lambda: revert(moved.patch, moved.out, base=moved.base),
        lambda: blame(["x"], moved.out, base=moved.base),
        lambda: evaluate_edit(moved.out, [FACT], base=moved.base),
        lambda: apply([patch_for(moved.true, seed=7)], moved.out, tmp_path / "both", base=moved.base),
    ]
    for act in refused:
        with pytest.raises(BaseMismatch, match="is not the base this model was edited from") as e:
            act()
        assert NAME in e.value.where and "me/model" in e.value.fix
    assert wrong(moved.out, moved.base) == [f"2 edited tensors in {moved.base}"]
    assert not (tmp_path / "both").exists()
    moved.found(base=moved.cached)


def test_where_a_base_is_said_to_be(folder: Folder) -> None:
    for base_path in ("x" * 4096, "//nowhere/at all", "bad\ufeffname", "a b/c"):
        folder.write(base_path=base_path)
        journal = read_journal(folder.out)
        assert journal and not list(BaseTensors(open_checkpoint(folder.out), journal).models())
        assert out_of_reach(journal) == "the base is out of reach"


# The file


@pytest.mark.parametrize(
    ("spoilt", "what"),
    [
        ({"format": 2}, "unknown format"),
        ({"format": True}, "unknown format"),
        ({"extra": 1}, "extra"),
        ({"model": ""}, "is not a text"),
        ({"model": "x" * 5000}, "is not a text"),
        ({"base_path": "a\0b"}, "is not a text"),
        ({"revision": 5}, "is not a text"),
        ({"kept_base": "yes"}, "kept_base"),
        ({"kept_base": None}, "kept_base"),
        ({"tensors": {}}, "'tensors' is empty"),
        ({"tensors": []}, "'tensors' is empty"),
        ({"tensors": {NAME: None}}, "is not an object"),
        ({"tensors": {NAME: {"base_sha256": "0" * 64}}}, "lacks or has besides: sha256"),
        ({"tensors": {NAME: {"base_sha256": "", "sha256": "0" * 64}}}, "no sha256"),
        ({"tensors": {NAME: {"base_sha256": "0" * 64, "sha256": "X" * 64}}}, "no sha256"),
        ({"tensors": {NAME: {"base_sha256": ["0" * 64], "sha256": "0" * 64}}}, "no sha256"),
        ({"patches": []}, "is empty"),
        ({"patches": {}}, "is empty"),
        ({"patches": [[]]}, "is not an object"),
        ({"patches": [{"id": "a" * 64, "file": "mosectl/" + "a" * 16 + ".safetensors", "facts": -1}]}, "not a number"),
        (
            {"patches": [{"id": "a" * 64, "file": "mosectl/" + "a" * 16 + ".safetensors", "facts": True}]},
            "not a number",
        ),
        ({"patches": [{"id": "a" * 64, "file": "mosectl/" + "b" * 16 + ".safetensors", "facts": 1}]}, "file is not"),
        ({"patches": [{"id": "a" * 64, "file": "/etc/passwd", "facts": 1}]}, "file is not"),
        ({"patches": [{"id": "a" * 64, "file": "mosectl/../x.safetensors", "facts": 1}]}, "file is not"),
        ({"patches": [{"id": "a" * 64, "file": None, "facts": 1}]}, "file is not"),
        ({"patches": [{"id": 7, "file": "mosectl/" + "a" * 16 + ".safetensors", "facts": 1}]}, "not a patch id"),
        (
            {"patches": [{"id": "a" * 64, "file": "mosectl/" + "a" * 16 + ".safetensors", "facts": 1}] * 2},
            "stands twice",
        ),
    ],
)
def test_fields_of_the_wrong_kind(spoilt: dict[str, Any], what: str, folder: Folder) -> None:
    folder.write(**spoilt)
    acts: list[Callable[[], object]] = [lambda: read_journal(folder.out), lambda: verify(folder.out)]
    for act in (*acts, lambda: revert(folder.patch, folder.out)):
        with pytest.raises(ModelError, match=f"damaged journal: .*{what}") as e:
            act()
        assert e.value.where.endswith("mosectl.json")
    assert folder.untouched()


@pytest.mark.parametrize("kind", ["pipe", "endless", "sparse", "brackets", "list", "folder", "twice"])
def test_files_that_are_no_journal(kind: str, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder.out / "mosectl.json"
    text = path.read_text()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(20 * 10**9)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(
            {"brackets": "[" * 100_000, "list": "[]", "twice": text.replace("{", '{"format": 1, ', 1)}[kind]
        )
    start = time.perf_counter()
    for command in (
        ("log", folder.out),
        ("verify", folder.out),
        ("revert", folder.out, "--patch", folder.patch.id[:12]),
    ):
        assert run(*command) == 4
        assert "mosectl.json" in capsys.readouterr().err
    assert time.perf_counter() - start < 5 and folder.untouched()


@pytest.mark.slow
def test_any_journal(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Folder(tmp_path_factory.mktemp("fuzz"))
    before = {name: sha256(open_checkpoint(folder.base).read(name)) for name in folder.journal["tensors"]}
    acts: list[Callable[[], object]] = [lambda: history(folder.out), lambda: verify(folder.out)]

    @fuzzing
    @given(mutated(folder.journal))
    def one(journal: Any) -> None:
        (folder.out / "mosectl.json").write_text(json.dumps(journal), "utf-8")
        for act in acts:
            try:
                act()
            except MosectlError as e:
                assert e.exit_code > 1
        target = folder.tmp / "back"
        shutil.rmtree(target, ignore_errors=True)
        try:
            done = revert(folder.patch, folder.out, target)
        except MosectlError as e:
            assert e.exit_code > 1
        else:  # whatever the journal says: what is called restored is so
            now = open_checkpoint(target)
            assert not done.restored or {name: sha256(now.read(name)) for name in before} == before

    one()
    assert folder.untouched()
