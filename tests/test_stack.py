"""apply and revert on folders: every dtype, sharded, stacked, undone exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mosectl.checkpoints.apply import apply, check_stack, revert
from mosectl.checkpoints.live import patched
from mosectl.errors import BaseMismatch, ModelError, OutputError, PatchError
from mosectl.linalg.rotation import nearest_rotation
from mosectl.model.architecture import resolve
from mosectl.model.loading import load
from mosectl.patch.change import change_between, changed
from mosectl.patch.file import Patch
from mosectl.render import written
from mosectl.storage.checkpoint import open_checkpoint
from support.models import save
from support.patches import hashes, patch_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_apply_and_revert(model_type: str, shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tmp_path / "base", model_type, dtype, shard)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard != "1GB")
    original, patch = hashes(base), patch_for(base)
    done = apply([patch], base, tmp_path / "out")
    assert hashes(base) == original, "the base must not change"
    differing = {n for n, h in hashes(tmp_path / "out").items() if h != original[n]}
    assert len(differing) == 2 and {t.tensor for t in done.tensors} == differing
    assert all(t.exact and t.stability and t.stability.norm_drift < 3e-3 for t in done.tensors)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    p = resolve(fresh).projections[0]
    wanted = p.stored(changed([patch.changes[p.name]], p.oriented(fresh.get_submodule(p.name).weight)))
    assert torch.equal(loaded.get_submodule(p.name).weight, wanted)

    back = revert(patch, tmp_path / "out")
    assert back.restored and hashes(tmp_path / "out") == original
    assert not (tmp_path / "out" / "mosectl.json").exists() and not (tmp_path / "out" / "mosectl").exists()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in base.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_says_that_drifts_include_rounding(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base", dtype=dtype)
    written.applied(apply([patch_for(base)], base, tmp_path / "out"), "Applied")
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype)
    assert (f"these drifts include rounding the changed weights to {name}; " in capsys.readouterr().out) == bool(name)


def test_stack_is_rounded_once_and_undone_in_any_order(tmp_path: Path) -> None:
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    original = hashes(base)
    a, b, c = (patch_for(base, seed=s) for s in range(3))
    apply([a, b], base, tmp_path / "ab")
    apply([c], tmp_path / "ab", tmp_path / "abc")
    apply([a, b, c], base, tmp_path / "once")
    assert hashes(tmp_path / "abc") == hashes(tmp_path / "once")
    revert(b.id[:10], tmp_path / "abc")
    apply([a, c], base, tmp_path / "ac")
    assert hashes(tmp_path / "abc") == hashes(tmp_path / "ac")
    revert(a, tmp_path / "abc")
    assert revert(c, tmp_path / "abc").restored and hashes(tmp_path / "abc") == original


def test_a_patch_counts_once_and_its_dependents_are_told(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    a = patch_for(base)
    with pytest.raises(PatchError, match="given twice"):
        apply([a, a], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply([a], base, tmp_path / "out")
    with pytest.raises(PatchError, match="already applied"):
        apply([a], tmp_path / "out", tmp_path / "again")
    b = Patch(**{**vars(patch_for(tmp_path / "out", seed=1)), "parents": (a.id,)})
    with pytest.raises(BaseMismatch, match="computed on top of"):
        check_stack(open_checkpoint(base), [b])
    check_stack(open_checkpoint(base), [a, b])
    apply([b], tmp_path / "out", tmp_path / "both")
    (warning,) = revert(a, tmp_path / "both").warnings
    assert b.id[:12] in warning


def test_journal_says_what_was_done(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    patch = patch_for(base)
    apply([patch], base, out)
    journal = json.loads((out / "mosectl.json").read_text())
    assert [p["id"] for p in journal["patches"]] == [patch.id]
    assert Patch.load(out / journal["patches"][0]["file"]).id == patch.id
    now = hashes(out)
    assert {n: t["sha256"] for n, t in journal["tensors"].items()} == {n: now[n] for n in journal["tensors"]}
    with pytest.raises(PatchError, match="already applied"):
        apply([patch], out, tmp_path / "twice")


def test_revert_fetches_the_base_where_it_was_not_kept(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "out"
    patch = patch_for(base)
    apply([patch], base, out, keep_base=False)
    assert not (out / "mosectl" / "base.safetensors").exists()
    assert revert(patch, out, tmp_path / "back").restored and hashes(tmp_path / "back") == hashes(base)
    base.rename(tmp_path / "gone")
    done = revert(patch, out, tmp_path / "back2")
    assert not done.restored and all(not t.exact and "exact up to rounding" in t.note for t in done.tensors)
    for name in (t.tensor for t in done.tensors):
        W, again = (
            open_checkpoint(tmp_path / "gone").read(name).float(),
            open_checkpoint(tmp_path / "back2").read(name).float(),
        )
        assert float((W - again).norm() / W.norm()) < 5e-3
    assert revert(patch, out, tmp_path / "back3", base=tmp_path / "gone").restored


def test_revert_without_a_journal(tmp_path: Path) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    patch = patch_for(base)
    apply([patch], base, out)
    (out / "mosectl.json").unlink()
    shutil.rmtree(out / "mosectl")
    done = revert(patch, out)
    assert all("undone algebraically" in t.note for t in done.tensors)
    name = done.tensors[0].tensor
    assert torch.allclose(open_checkpoint(out).read(name), open_checkpoint(base).read(name), atol=1e-6)
    with pytest.raises(PatchError, match="not applied here"):
        revert(patch, base, tmp_path / "x")
    with pytest.raises(BaseMismatch, match="away from its base"):
        revert(patch, save(tmp_path / "other", "llama", intermediate_size=48, vocab_size=400), tmp_path / "y")


@pytest.mark.parametrize("made", DTYPES, ids=str)
@pytest.mark.parametrize("used", DTYPES, ids=str)
def test_patch_of_one_dtype_on_another(made: torch.dtype, used: torch.dtype, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", dtype=made), save(tmp_path / "b", dtype=made)
    AutoModelForCausalLM.from_pretrained(a, dtype=used).save_pretrained(b)
    done = apply([patch_for(a)], b, tmp_path / "out")
    note = done.tensors[0].note
    assert note == "sha256 matches" if made == used else "exact within" in note
    assert done.tensors[0].dtype == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[used]
    assert revert(patch_for(a), tmp_path / "out").restored and hashes(tmp_path / "out") == hashes(b)


def test_wrong_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    other = save(tmp_path / "other", vocab_size=400)
    patch = patch_for(base)
    with pytest.raises(BaseMismatch, match="sha256 differs") as e:
        apply([patch], other, tmp_path / "out")
    assert "down_proj.weight" in e.value.where and "--force" in e.value.fix
    with pytest.raises(BaseMismatch, match="no module"):
        apply([patch], save(tmp_path / "gpt", "gpt2"), tmp_path / "out")
    with pytest.raises(BaseMismatch, match="shape"):
        apply([patch], save(tmp_path / "wide", intermediate_size=64), tmp_path / "out", force=False)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "other", "gpt", "wide"}
    assert apply([patch], other, tmp_path / "out", force=True).stack == (patch.id,)


def test_output_exists(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        apply([patch_for(base)], base, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_untouched_files_are_linked_and_nothing_leaks(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    done = apply([patch_for(base, layers=(1,))], base, tmp_path / "out")
    linked = [f for f in (tmp_path / "out").glob("*.safetensors") if f.stat().st_nlink > 1]
    assert len(linked) == len(list(base.glob("*.safetensors"))) - 1
    assert done.bytes_written < sum(f.stat().st_size for f in base.glob("*.safetensors"))
    assert (tmp_path / "out" / "config.json").stat().st_nlink == 1, "people edit config.json in place"


@pytest.mark.parametrize("moment", ["clone", "Journal.write", "stream_tensors"])
def test_a_crash_leaves_old_or_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save(tmp_path / "base"), tmp_path / "out"
    patch, second = patch_for(base), patch_for(base, seed=5)
    apply([patch, second], base, out)
    state = hashes(out)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mosectl.checkpoints.writer.{moment}", crash)
    with pytest.raises(KeyboardInterrupt):
        apply([patch], base, tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        revert(patch, out)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"} and hashes(out) == state


def test_damaged_models(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    patch = patch_for(base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged weights"):
        apply([patch], base, tmp_path / "out")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled"):
        apply([patch], base, tmp_path / "out")
    out = save(tmp_path / "edited")
    (out / "mosectl.json").write_text('{"format": 1, "patches": [{"id": "x", "file": "../../evil", "facts": 1}]}')
    with pytest.raises(ModelError, match="damaged journal"):
        revert(patch, out)


def test_patched_in_memory_equals_apply(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    a, b = patch_for(base), patch_for(base, seed=1, layers=(1, 2))
    apply([a, b], base, tmp_path / "out")
    live, edited = load(base).model, load(tmp_path / "out").model
    before = {n: p.clone() for n, p in live.named_parameters()}
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad(), patched(live, a, b):
        assert torch.equal(live(ids).logits, edited(ids).logits)
    assert all(torch.equal(p, before[n]) for n, p in live.named_parameters())
    with pytest.raises(BaseMismatch), patched(edited, a):
        pass


@pytest.mark.parametrize("side", ["input", "both", "additive"])
def test_other_sides_apply_stack_and_come_off(side: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    original, turned = hashes(base), patch_for(base, seed=3)
    checkpoint = open_checkpoint(base)
    changes = {}
    for name, made_for in turned.base.items():
        W = checkpoint.read(made_for.tensor).double()
        d, p = W.shape
        g = torch.Generator().manual_seed(0)
        L, R = (nearest_rotation(torch.eye(n) + 0.1 * torch.randn(n, n, generator=g)) for n in (d, p))
        new = {"input": W @ R, "both": L @ W @ R}.get(side, W + 0.1 * torch.outer(L[0], R[0]))
        changes[name] = change_between(W, new, side)
    patch = Patch(**{**vars(turned), "changes": changes, "side": side})
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").id == patch.id
    done = apply([turned, patch], base, tmp_path / "out")
    assert len(done.stack) == 2 and hashes(tmp_path / "out") != original
    live = load(base, dtype="bfloat16").model
    name = next(iter(changes))
    with patched(live, turned, patch):
        assert torch.equal(
            live.get_submodule(name).weight,
            load(tmp_path / "out", dtype="auto").model.get_submodule(name).weight.bfloat16(),
        )
    revert(turned, tmp_path / "out")
    assert revert(patch, tmp_path / "out").restored and hashes(tmp_path / "out") == original


def test_an_additive_patch_is_undone_without_its_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    turned = patch_for(base)
    checkpoint = open_checkpoint(base)
    changes = {}
    for name, made_for in turned.base.items():
        W = checkpoint.read(made_for.tensor).double()
        changes[name] = change_between(W, W + 0.1 * torch.ones_like(W), "additive")
    patch = Patch(**{**vars(turned), "changes": changes, "side": "additive"})
    apply([patch], base, tmp_path / "out", keep_base=False)
    (tmp_path / "out" / "mosectl.json").unlink()
    shutil.rmtree(base)
    done = revert(patch, tmp_path / "out")
    assert not done.restored and all("undone algebraically" in t.note for t in done.tensors)
