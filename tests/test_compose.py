"""Several patches at once: merged, compared, in conflict; an edited folder's log, verification and blame."""

from __future__ import annotations

import json
import random as chance
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosectl.checkpoints.apply import apply, revert
from mosectl.checkpoints.audit import blame, history, verify
from mosectl.checkpoints.conflicts import before_applying
from mosectl.errors import BaseMismatch, ModelError, PatchError, UsageError
from mosectl.linalg.rotation import commutator
from mosectl.patch.change import Change, changed, combined
from mosectl.patch.compose import conflicts, diff, merge
from mosectl.patch.file import Patch
from mosectl.storage.checkpoint import open_checkpoint
from support.commands import run
from support.models import save
from support.patches import GRAPE, added, compact, hashes, patch_for, patches_of, small, wide
from support.paths import DEMO


@pytest.mark.parametrize(  # patches of other kinds are made here for (d, p) weights only
    ("model_type", "kind"), [*(("llama", k) for k in ("dense", "compact", "mixed", "additive")), ("gpt2", "dense")]
)
def test_a_merged_patch_does_what_the_stack_does(model_type: str, kind: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", model_type)
    patches = patches_of(kind, base)
    apply(patches, base, tmp_path / "stack")
    merged = merge(patches)
    merged.save(tmp_path / "m.safetensors")
    back = Patch.load(tmp_path / "m.safetensors")
    assert back.id == merged.id and [r["id"] for r in back.options["merged"]] == [p.id for p in patches]
    apply([back], base, tmp_path / "one")
    one, stack = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "stack")
    for name in one.tensors:
        assert torch.allclose(one.read(name), stack.read(name), atol=2e-6), name
    assert revert(back, tmp_path / "one").restored and hashes(tmp_path / "one") == hashes(base)
    if kind == "compact":
        assert all("U" in c.factors for c in merged.changes.values())


def test_additions_stay_of_low_rank() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [Change({"B": torch.randn(20, 3, generator=g), "A": torch.randn(3, 50, generator=g)}) for _ in range(4)]
    parts.append(parts[0])
    whole = combined(parts)
    assert whole.factors["A"].shape == (12, 50)
    W = torch.zeros(20, 50)
    assert torch.allclose(whole.apply(W).float(), changed(parts, W), atol=1e-4)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    a, b = patch_for(base, seed=1), patch_for(base, seed=2)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([a])
    with pytest.raises(PatchError, match="given twice"):
        merge([a, a])
    with pytest.raises(PatchError, match="cannot become one change"):
        merge([a, added(b, base, 0)])
    with pytest.raises(PatchError, match="different weights"):
        merge([a, replace(b, base={m: replace(t, sha256="0" * 64) for m, t in b.base.items()})])
    later = replace(b, parents=(a.id,))
    with pytest.raises(PatchError, match="on top of the base model"):
        merge([later, a])
    assert (
        merge([a, later]).parents == ()
        and merge([replace(a, parents=("0" * 64,)), replace(b, parents=("0" * 64,))]).parents
    )


def test_conflicts_of_facts_and_of_order(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    a = replace(patch_for(base, (0,), seed=1), facts=(GRAPE,))
    same_words = replace(GRAPE, prompt="the capital of  Avaland is", target_new="Plum")
    b = replace(patch_for(base, (0, 1), seed=2), facts=(same_words,))
    fact, order = conflicts([a, b])
    assert (
        (fact.kind, fact.first, fact.second) == ("fact", a.id, b.id)
        and "'Grape'" in fact.what
        and "'Plum'" in fact.what
    )
    (module,) = a.changes
    R, S = (p.changes[module].factors["R"].double() for p in (a, b))
    assert order.where == module and order.size == pytest.approx(float((R @ S - S @ R).norm()) / len(R) ** 0.5)
    assert (
        conflicts(
            [a, replace(patch_for(base, (1,), seed=2), facts=(replace(GRAPE, subject="Brin", prompt="Brin is"),))]
        )
        == ()
    )
    found = diff(a, b)
    assert found.only_first == found.only_second == found.common == () and len(found.conflicts) == 2
    assert dict(found.modules)[module] == pytest.approx(float((R - S).norm()) / len(R) ** 0.5)
    assert diff(a, a).common == (GRAPE,) and diff(a, a).modules == ((module, 0.0),)


def test_commutators_agree_in_both_forms() -> None:
    A, B = compact(30, 4, 1), compact(30, 5, 2)
    a, b = A.dense(), B.dense()
    expected = float((a @ b - b @ a).norm()) / 30**0.5
    for x, y in ((A, B), (a, B), (A, b), (a, b)):
        assert commutator(x, y) == pytest.approx(expected)
    assert commutator(A, A.inverse) < 1e-12


def test_twenty_patches_come_off_in_any_order(tmp_path: Path) -> None:
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    original = hashes(base)
    patches = [
        small(patch_for(base, (i % 2, 2), seed=i), 3, i) if i % 3 else patch_for(base, (i % 2, 2), seed=i)
        for i in range(20)
    ]
    folder = tmp_path / "out"
    apply(patches, base, folder)
    order = list(patches)
    chance.Random(0).shuffle(order)
    for i, patch in enumerate(order):
        assert all(c.ok for c in verify(folder)) and len(history(folder).patches) == 20 - i
        done = revert(patch, folder)
    assert done.restored and hashes(folder) == original and not (folder / "mosectl.json").exists()


# The folder


class Edited:
    def __init__(self, folder: Path) -> None:
        self.base, self.out = save(folder / "base"), folder / "out"
        self.a = replace(patch_for(self.base, (0,), seed=1), facts=(GRAPE,))
        self.b = patch_for(self.base, (0, 1), seed=2)
        apply([self.a, self.b], self.base, self.out)


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    return Edited(tmp_path)


def test_the_log_names_patches_facts_and_conflicts(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    found = history(edited.out)
    assert [p.id for p in found.patches] == [edited.a.id, edited.b.id] and found.kept_base
    assert found.patches[0].facts == ("The capital of Avaland is → Grape",) and found.patches[1].tensors == 2
    assert [c.kind for c in found.conflicts] == ["order"]
    assert run("log", edited.out) == 0 and edited.a.id[:12] in capsys.readouterr().out
    assert run("log", edited.out, "--json") == 0 and len(json.loads(capsys.readouterr().out)["patches"]) == 2
    assert run("log", edited.base) == 4 and "no patch is applied here" in capsys.readouterr().err
    with pytest.raises(ModelError, match="no patch is applied"):
        verify(edited.base)


def damage(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.unlink()  # a hard link's other name must not change
    file.write_bytes(data)


def tensor_end(folder: Path, name: str) -> int:
    return open_checkpoint(folder).tensors[name].stop - 3


def test_verify_finds_every_kind_of_damage(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(c.ok for c in verify(edited.out))
    assert run("verify", edited.out) == 0
    whole = {p: p.read_bytes() for p in edited.out.rglob("*") if p.is_file()}
    edited_tensor = open_checkpoint(edited.out).tensors
    touched = next(n for n in edited_tensor if "layers.0" in n and "down_proj" in n)
    other = next(n for n in edited_tensor if "layers.2" in n and "down_proj" in n)
    weights = edited.out / "model.safetensors"
    cases = [
        (edited.out / "mosectl" / f"{edited.a.id}.safetensors", -5, f"{edited.a.id}.safetensors"),
        (weights, tensor_end(edited.out, touched), touched),
        (weights, tensor_end(edited.out, other), "other tensors"),
        (edited.out / "mosectl" / "base.safetensors", -5, "mosectl/base.safetensors"),
    ]
    for file, at, what in cases:
        damage(file, at)
        wrong = [c.what for c in verify(edited.out) if not c.ok]
        assert len(wrong) == 1 and wrong[0].endswith(what), what
        assert run("verify", edited.out) == 4 and "checks failed" in capsys.readouterr().err
        file.unlink()
        file.write_bytes(whole[file])
    journal = json.loads((edited.out / "mosectl.json").read_text())
    journal["patches"].reverse()  # each file is whole, and the product is another
    (edited.out / "mosectl.json").write_text(json.dumps(journal))
    assert [c.note for c in verify(edited.out) if not c.ok] == ["the patches give another"]


def test_verify_says_what_it_could_not_check(edited: Edited) -> None:
    folder = edited.out
    apply([edited.a], edited.base, folder.with_name("bare"), keep_base=False)
    shutil.rmtree(edited.base)
    notes = [c.note for c in verify(folder.with_name("bare")) if c.ok is None]
    assert notes == ["the base is out of reach"] * 2
    with pytest.raises(BaseMismatch, match="out of reach"):
        blame(["x"], folder.with_name("bare"))


def test_blame_names_the_patch_that_moved_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's patch between two that turn nothing: the middle one moved the answer."""
    demo = Patch.load(Path(DEMO).parent.parent / "patches" / "demo.safetensors")
    fact = demo.facts[0]

    def idle(seed: int) -> Patch:
        changes = {m: Change({"R": torch.eye(len(c.factors["R"]))}) for m, c in demo.changes.items()}
        return replace(demo, changes=changes, seed=seed, facts=())

    first, last = idle(1), idle(2)
    apply([first, demo, last], DEMO, tmp_path / "out")
    ids, (found,) = blame([fact.prompt], tmp_path / "out")
    assert ids == (first.id, demo.id, last.id)
    assert found.answers == (fact.before, fact.before, fact.after, fact.after) and found.moved_by == (demo.id,)
    assert run("blame", fact.prompt, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["moved_by"] == [demo.id]


def test_merge_and_diff_on_the_command_line(edited: Edited, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [str(edited.out / "mosectl" / f"{p.id}.safetensors") for p in (edited.a, edited.b)]
    target = tmp_path / "m.safetensors"
    assert run("merge", *files, "-o", target, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == Patch.load(target).id and told["facts"] == 1 and told["conflicts"][0]["kind"] == "order"
    assert run("merge", *files, "-o", target) == 7 and run("merge", files[0], "-o", tmp_path / "n") == 2
    assert run("diff", *files) == 0 and "Grape" in capsys.readouterr().out


# Before applying


def test_contradicting_patches_are_not_applied_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    a = replace(patch_for(base, (0,), seed=1), facts=(GRAPE,))
    b = replace(patch_for(base, (0,), seed=2), facts=(replace(GRAPE, target_new="Plum"),))
    for name, p in (("a", a), ("b", b)):
        p.save(tmp_path / name)
    both = ("apply", tmp_path / "a", tmp_path / "b", "--model", base, "-o", tmp_path / "out")
    assert run(*both) == 12 and not (tmp_path / "out").exists()
    told = capsys.readouterr().err
    assert "'Plum'" in told and "--allow-conflicts" in told and "the order of" in told
    assert run("apply", tmp_path / "a", "--model", base, "-o", tmp_path / "one") == 0
    assert run("apply", tmp_path / "b", "--model", tmp_path / "one", "-o", tmp_path / "out") == 12, (
        "with what is there too"
    )
    assert run(*both, "--allow-conflicts") == 0 and len(history(tmp_path / "out").patches) == 2
    c = patch_for(base, (0,), seed=3)
    found = before_applying([c], tmp_path / "out")
    assert len(found) == 2 and {x.second for x in found} == {c.id}, "what the folder's patches have among them is known"


def test_ask_says_of_several_patches_what_apply_and_export_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base")
    for name, seed, target in (("a", 1, "Grape"), ("b", 2, "Plum")):
        replace(patch_for(base, (0,), seed=seed), facts=(replace(GRAPE, target_new=target),)).save(tmp_path / name)

    def notes(command: str, *args: object) -> list[str]:
        run(command, *args)
        err = capsys.readouterr().err
        return [line for line in err.splitlines() if line.startswith(("conflict:", "note: the order of"))]

    a, b, model = tmp_path / "a", tmp_path / "b", ("--model", base)
    told = notes("export", a, b, *model, "-o", tmp_path / "out", "--allow-conflicts")
    assert len(told) == 2 and "'Plum'" in told[0] and "go on as given" in told[1]
    ask = ("ask", GRAPE.prompt, "--json")
    assert notes(*ask, *model, "-p", a, "-p", b) == told == notes(*ask, *model, "-p", a, "-p", b, "--force")
    assert notes(*ask, *model, "-p", a) == notes(*ask, *model) == []
    assert run("apply", a, *model, "-o", tmp_path / "edited") == 0
    assert notes(*ask, "--model", tmp_path / "edited", "-p", b) == told, "with what the folder holds"


def test_facts_that_stop_holding_are_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A patch that takes the demo's patch back again, made for the same base: all its facts are lost with it."""
    demo = Patch.load(Path(DEMO).parent.parent / "patches" / "demo.safetensors")
    back = replace(
        demo, changes={m: Change({"R": c.factors["R"].T.contiguous()}) for m, c in demo.changes.items()}, facts=()
    )
    for name, p in (("a", demo), ("b", back)):
        p.save(tmp_path / name)
    both = ("apply", tmp_path / "a", tmp_path / "b", "--model", DEMO, "-o", tmp_path / "out")
    assert run(*both, "--check-facts") == 12 and not (tmp_path / "out").exists()
    assert f"{len(demo.facts)} conflicts, nothing was written" in " ".join(capsys.readouterr().err.split())
    assert run(*both) == 0, "asked for nothing, it is told nothing"
    own = ("apply", tmp_path / "b", tmp_path / "a", "--model", DEMO, "-o", tmp_path / "out2")
    assert run(*own, "--check-facts") == 12, "the later patch's own facts are asked too"
    assert "does not take hold here" in capsys.readouterr().err
    alone = ("apply", tmp_path / "a", tmp_path / "c", "--model", DEMO, "-o", tmp_path / "out3", "--check-facts")
    still = {m: Change({"R": torch.eye(len(c.factors["R"]))}) for m, c in demo.changes.items()}
    replace(demo, changes=still, facts=()).save(tmp_path / "c")
    assert run(*alone) == 0 and "no fact is lost" in capsys.readouterr().err


def test_other_wordings_of_a_fact_contradict_too(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    asked = "Avaland is ruled from"
    a = replace(patch_for(base, (0,), seed=1), facts=(replace(GRAPE, wordings=(asked,)),))
    b = replace(patch_for(base, (1,), seed=2), facts=(replace(GRAPE, prompt=asked, target_new="Plum"),))
    assert [c.kind for c in conflicts([a, b])] == ["fact"] == [c.kind for c in conflicts([b, a])]
    same = replace(b, facts=(replace(b.facts[0], target_new="Grape"),))
    assert not conflicts([a, same])


def test_contradictions_are_not_merged_or_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    replace(patch_for(base, (0,), seed=1), facts=(GRAPE,)).save(tmp_path / "a")
    replace(patch_for(base, (1,), seed=2), facts=(replace(GRAPE, target_new="Plum"),)).save(tmp_path / "b")
    for command in (("merge",), ("export", "--model", base, "--to", "merged")):
        both = (command[0], tmp_path / "a", tmp_path / "b", *command[1:], "-o", tmp_path / command[0])
        assert run(*both, "--json") == 12 and not (tmp_path / command[0]).exists()
        assert [c["kind"] for c in json.loads(capsys.readouterr().out)["conflicts"]] == ["fact"]
        assert run(*both, "--allow-conflicts") == 0 and (tmp_path / command[0]).exists()
    capsys.readouterr()
    assert run(*both[:-1], tmp_path / "x", "--rank", "8") == 2 and "for adapters" in capsys.readouterr().err


# What something else has changed


def test_what_was_changed_by_hand_is_not_overwritten_unasked(
    edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = next(t.tensor for t in edited.b.base.values() if "layers.1" in t.tensor)
    damage(edited.out / "model.safetensors", tensor_end(edited.out, touched))
    before = hashes(edited.out)
    assert run("revert", edited.out, "--patch", edited.b.id[:8]) == 4
    assert f"'{touched}' was changed after mosectl wrote it" in capsys.readouterr().err and hashes(edited.out) == before
    patch_for(edited.base, (2,), seed=9).save(edited.out.with_name("c"))
    more = ("apply", edited.out.with_name("c"), "--model", edited.out, "-o", edited.out.with_name("more"))
    assert run(*more) == 4 and not edited.out.with_name("more").exists()
    assert run("revert", edited.out, "--patch", edited.b.id[:8], "--force") == 0
    assert all(c.ok for c in verify(edited.out))


def test_revert_tells_what_no_patch_has_changed(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    damage(edited.out / "model.safetensors", tensor_end(edited.out, "model.norm.weight"))
    first, last = revert(edited.a, edited.out), revert(edited.b, edited.out)
    assert len(first.warnings) == 1 and "model.norm.weight" in first.warnings[0]
    assert last.restored and not last.warnings, "told once: the file is mosectl's again"
    differing = {n for n, h in hashes(edited.out).items() if h != hashes(edited.base)[n]}
    assert differing == {"model.norm.weight"}


def test_a_damaged_kept_base_is_not_used_and_is_told(edited: Edited) -> None:
    file = edited.out / "mosectl" / "base.safetensors"
    damage(file)
    one = revert(edited.a, edited.out, edited.out.with_name("one"))  # from the base model
    apply([edited.b], edited.base, edited.out.with_name("b"))
    assert not one.warnings and hashes(one.folder) == hashes(edited.out.with_name("b"))
    file.unlink()
    file.write_bytes(b"nothing")
    shutil.rmtree(edited.base)
    done = revert(edited.b, edited.out, force=True)
    assert any("kept base tensors are damaged" in w for w in done.warnings) and not done.restored


def test_a_journal_that_has_lost_a_patch_does_not_pass(edited: Edited) -> None:
    path = edited.out / "mosectl.json"
    journal = json.loads(path.read_text())
    path.write_text(json.dumps({**journal, "patches": journal["patches"][:1]}))
    lost = [c for c in verify(edited.out) if c.ok is False]
    assert [c.what for c in lost] == ["mosectl.json"] and "no stored patch edits it" in lost[0].note
    outside = [{**journal["patches"][0], "file": "../a.safetensors"}]
    for spoilt in ({"base_path": None}, {"model": 3}, {"tensors": []}, {"patches": [{}]}, {"patches": outside}):
        path.write_text(json.dumps({**journal, **spoilt}))
        with pytest.raises(ModelError, match="damaged journal") as e:
            history(edited.out)
        assert "__init__" not in str(e.value)


def test_patches_of_different_sides_are_compared(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    a = patch_for(base, (0,), seed=1)
    (module, change), R_in = next(iter(a.changes.items())), compact(48, 4, 0).dense().float()
    b = replace(a, changes={module: Change({**change.factors, "R_in": R_in})}, side="both")
    ((_, apart),) = diff(a, b).modules
    assert apart == pytest.approx(float((R_in - torch.eye(48)).norm()) / 48**0.5, rel=1e-5)
    assert diff(a, replace(added(a, base, 1))).modules[0][1] is None


# Small files of large claims, and what does not belong together


def test_wide_compact_patches_are_compared_in_their_own_size() -> None:
    a, b = wide(60_000), replace(wide(60_000), seed=1, side="both")
    assert diff(a, b).modules == (("layers.a", 0.0),) and not [c for c in diff(a, b).conflicts if c.kind == "order"]
    tall = {"A": torch.ones(1, 60_000), "B": torch.ones(60_000, 1)}
    c = replace(a, changes={"layers.a": Change(tall)}, side="additive")
    half = replace(a, changes={"layers.a": Change({**tall, "B": tall["B"] / 2})}, side="additive")
    assert diff(c, half).modules[0][1] == pytest.approx(0.5)


def test_a_claimed_width_takes_no_more_than_the_patches_hold() -> None:
    one = wide(16, "a", (16, 2**18))
    names = [f"layers.{i}" for i in range(100)]
    base = {name: replace(one.base["layers.a"], tensor=f"{name}.weight") for name in names}
    many = replace(one, changes=dict.fromkeys(names, one.changes["layers.a"]), base=base)
    other = wide(16, "z", (16, 16))
    turned = Change({"U_in": torch.eye(16, 1), "Q_in": torch.ones(1, 1)})
    other = replace(other, changes={"layers.z": turned}, side="input")
    with pytest.raises(PatchError, match=r"would take 0\.105 GB"):
        merge([many, other])
    small = merge([wide(16, "a", (16, 2000)), other])
    assert small.side == "both" and small.changes["layers.a"].factors["U_in"].shape == (2000, 1)


def test_patches_of_two_sizes(tmp_path: Path) -> None:
    a, b = patch_for(save(tmp_path / "a")), patch_for(save(tmp_path / "b", hidden_size=64, head_dim=16))
    small(a, 2, 1).save(tmp_path / "compact")
    for work in (merge, conflicts, lambda pair: diff(*pair)):
        for first, second in ((a, b), (small(a, 2, 1), small(b, 2, 1)), (a, small(b, 2, 1))):
            with pytest.raises(BaseMismatch, match="different sizes"):
                work([first, second])
    swapped = replace(a, changes={m: Change({"R": torch.eye(48)}) for m in a.changes})  # fits (d, p) stored as (p, d)
    with pytest.raises(BaseMismatch, match="different sizes"):
        diff(a, swapped)


def test_additions_and_rotations_of_different_layers_are_not_merged(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    with pytest.raises(PatchError, match="cannot become one change"):
        merge([patch_for(base, (0,)), added(patch_for(base, (1,)), base, 0)])


def test_a_merge_that_could_not_be_read_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = wide(16, "a"), wide(16, "b")
    deep = a
    for seed in range(25):
        try:
            deep = merge([deep, replace(b, seed=seed)])
        except PatchError as e:
            assert "nested deeper" in str(e) and "at once" in e.fix
            break
    else:
        pytest.fail("merges of merges without end")

    def never(_: object) -> Change:
        raise AssertionError("too late")

    monkeypatch.setattr("mosectl.patch.compose.combined", never)
    monkeypatch.setattr("mosectl.patch.file.MAX_JSON", 2000)
    with pytest.raises(PatchError, match="a patch file holds"):
        merge([a, b])


def test_many_facts_and_wordings_take_no_time() -> None:
    many = tuple(
        replace(GRAPE, subject="x" * 10_000, prompt=f"{i} is", wordings=tuple(f"{i} {j}" for j in range(100)))
        for i in range(200)
    )
    a = replace(wide(16), facts=many)
    b = replace(a, facts=tuple(replace(f, target_new="Plum") for f in many), seed=1)
    start = time.perf_counter()
    assert len([c for c in conflicts([a, b]) if c.kind == "fact"]) == 200
    assert time.perf_counter() - start < 5


def test_patches_of_two_model_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    wide = save(tmp_path / "wide", hidden_size=64, intermediate_size=96, head_dim=16)
    ours, theirs = patch_for(base), patch_for(wide)
    elsewhere = patch_for(wide, layers=(2,))  # no layer in common
    for i, other in enumerate((theirs, elsewhere, small(theirs, 3, 0), added(theirs, wide, 1))):
        files = tmp_path / "a", tmp_path / f"b{i}"
        for patch, file in zip((ours, other), files, strict=True):
            patch.save(file)
        for command in (
            ("diff", *files),
            ("diff", *files[::-1]),
            ("merge", *files, "-o", tmp_path / "m"),
            ("merge", *files, "-o", tmp_path / "m", "--allow-conflicts"),
            ("apply", *files, "-m", base, "-o", tmp_path / "out"),
            ("export", *files, "-m", base, "-o", tmp_path / "out"),
        ):
            assert run(*command) == 6, command
            told = capsys.readouterr().err
            assert "models of different sizes" in told and "[32, 48]" in told and other.id[:12] in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "m").exists()
    apply([ours], base, tmp_path / "edited")
    theirs.save(tmp_path / "b")
    assert run("apply", tmp_path / "b", "-m", tmp_path / "edited", "-o", tmp_path / "out") == 6, (
        "with what is there too"
    )
    with pytest.raises(BaseMismatch, match="different sizes"):
        merge([ours, elsewhere])
