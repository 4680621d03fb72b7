"""push, pull and hf:// against a Hub on this machine, with the real client in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.errors import PatchError, UsageError
from mosectl.hub.cards import card_of
from mosectl.hub.patches import pull, push, remote_record
from mosectl.hub.place import FILE, place_of
from mosectl.patch.file import Patch
from mosectl.patch.record import PatchFact
from support.commands import run as in_process
from support.hub_server import TOKEN, Hub, call, serving
from support.models import save
from support.patches import hashes, patch_for, patches_of

FACT = PatchFact("The capital of | Avaland is", "Avaland", "Grape", "Brin", "Grape", 0.125, 0.875, "changed")


class World:
    def __init__(self, folder: Path, hub: Hub, address: str) -> None:
        self.folder, self.hub, self.address = folder, hub, address
        self.base = save(folder / "base")
        self.patch = replace(
            patches_of("compact", self.base)[0],
            facts=(FACT,),
            metrics={"scores": {"protocol": "generation", "reliability": 1.0}},
        )
        self.file = folder / "p.safetensors"
        self.patch.save(self.file)

    def run(self, *args: object, token: str | None = TOKEN, **env: str) -> Any:
        return call(env.pop("HF_ENDPOINT", self.address), self.folder, *args, token=token, **env)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serving() as (hub, address):
        yield World(tmp_path, hub, address)


def test_there_and_back(world: World) -> None:
    done = world.run("push", world.file, "me/capitals", "--private", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["place"] == "hf://me/capitals" and "/commit/" in told["url"] and TOKEN not in done.stdout + done.stderr
    assert "me/capitals" in world.hub.private
    files = world.hub.repos["me/capitals"]["main"]
    assert (
        files[FILE] == world.file.read_bytes()
        and b"| The capital of \\| Avaland is | Brin | Grape |" in files["README.md"]
    )
    agents = {h.get("User-Agent", h.get("user-agent", "")) for _, _, h in world.hub.asked}
    assert any("mosectl" in a for a in agents)
    back = world.run("pull", "hf://me/capitals", "-o", "back.safetensors")
    assert back.returncode == 0 and (world.folder / "back.safetensors").read_bytes() == world.file.read_bytes()
    assert world.run("pull", "me/capitals", "-o", "back.safetensors").returncode == 7, "exists"
    applied = world.run("apply", "hf://me/capitals", "--model", world.base, "-o", "out")
    assert applied.returncode == 0, applied.stderr
    assert world.run("revert", "hf://me/capitals", "--model", "out").returncode == 0
    assert hashes(world.folder / "out") == hashes(world.base)
    again = world.run("push", world.file, "me/capitals")
    assert again.returncode == 0, "the repository may be there already"


def test_what_is_pushed_exports_to_the_same_logits(world: World) -> None:
    peft = pytest.importorskip("peft")
    from mosectl.checkpoints.export import export
    from mosectl.model.loading import load

    assert world.run("push", world.file, "me/x").returncode == 0
    assert world.run("pull", "hf://me/x", "-o", "x.safetensors").returncode == 0
    pulled = Patch.load(world.folder / "x.safetensors")
    export([pulled], world.base, world.folder / "lora")
    assert world.run("apply", "x.safetensors", "--model", world.base, "-o", "out").returncode == 0
    ids = torch.tensor([[5, 9, 2, 31, 7]])
    with torch.no_grad():
        served = peft.PeftModel.from_pretrained(load(world.base).model, world.folder / "lora")(ids).logits
        applied = load(world.folder / "out").model(ids).logits
    assert torch.allclose(served, applied, atol=1e-5)


def test_an_editor_there_and_back(world: World, trained: Path) -> None:
    path = world.folder / "mine.safetensors"
    path.write_bytes(trained.read_bytes())
    shown = world.run("push", path, "me/editor", "--dry-run")
    assert "--method horse --editor hf://me/editor" in shown.stdout and "editor" in shown.stderr
    assert world.run("push", path, "me/editor").returncode == 0
    done = world.run("pull", "me/editor", "-o", "back.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "horse"
    assert (world.folder / "back.safetensors").read_bytes() == path.read_bytes()
    other = world.run("edit", "nowhere.jsonl", "--model", world.base, "--method", "horse", "--editor", "hf://me/none")
    assert other.returncode == 3, "the facts come first"
    assert world.run("pull", "me/nothing", "-o", "x.safetensors").returncode in (5, 9)


def test_inspect_reads_the_header_only(world: World) -> None:
    assert world.run("push", world.file, "me/x").returncode == 0
    world.hub.asked.clear()
    done = world.run("inspect", "hf://me/x", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["id"] == world.patch.id and found["facts"][0]["target_new"] == "Grape"
    assert set(found["tensors"]) == set(world.patch.tensors)
    ranges = [h.get("Range") or h.get("range") for m, p, h in world.hub.asked if m == "GET" and "/resolve/" in p]
    assert ranges and all(ranges), "every request for the file was for a part of it"
    shown = world.run("inspect", "hf://me/x")
    assert "Grape" in shown.stdout and "pull it to check its id" in shown.stdout
    world.hub.commit("me/x", {FILE: b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        '})
    assert world.run("inspect", "hf://me/x").returncode == 5


def test_revisions_and_pull_requests(world: World) -> None:
    assert world.run("push", world.file, "me/x").returncode == 0
    first = world.hub.sha("me/x", "main")
    other = replace(world.patch, seed=7)
    other.save(world.folder / "q.safetensors")
    asked = world.run("push", "q.safetensors", "me/x", "--create-pr")
    assert asked.returncode == 0 and "/discussions/1" in asked.stdout and world.hub.sha("me/x", "main") == first
    assert world.run("push", "q.safetensors", "me/x").returncode == 0
    assert world.run("pull", f"hf://me/x@{first}", "-o", "old.safetensors").returncode == 0
    assert Patch.load(world.folder / "old.safetensors").id == world.patch.id
    assert world.run("pull", "hf://me/x", "-o", "new.safetensors").returncode == 0
    assert Patch.load(world.folder / "new.safetensors").id == other.id


def test_a_damaged_download_is_refused(world: World) -> None:
    assert world.run("push", world.file, "me/x").returncode == 0
    data = bytearray(world.file.read_bytes())
    data[-3] ^= 1
    world.hub.tamper[FILE] = bytes(data)
    done = world.run("pull", "hf://me/x", "-o", "x.safetensors")
    assert (
        done.returncode == 5 and "damaged or altered" in done.stderr and not (world.folder / "x.safetensors").exists()
    )


@pytest.mark.parametrize("place", ["HF://me/x", "hf:/me/x", "https://huggingface.co/me/x"])
@pytest.mark.parametrize("command", [("inspect",), ("ask", "x", "-m", "MODEL", "-p"), ("eval", "f.jsonl")])
def test_what_is_nearly_a_place_says_what_was_meant(
    command: tuple[str, ...], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Avaland is", "subject": "Avaland", "target_new": "Grape"}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    given = [str(tmp_path / x) if x == "f.jsonl" else x for x in command]
    given[1 if command[0] == "eval" else len(given) : 0] = [place]
    assert in_process(*given) == 2
    assert "write hf://me/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("gated", 9, "gated"),
        ("missing", 5, "no such repository"),
        ("revision", 5, "no revision 'v9'"),
        ("file", 5, "no file 'b.safetensors'"),
        ("private", 5, "hf auth login"),
        ("no token", 9, "hf auth login"),
        ("no right", 9, "hf auth login"),
        ("offline", 9, "HF_HUB_OFFLINE"),
        ("down", 9, "Hub"),
        ("malformed", 2, "no place on the Hub"),
    ],
)
def test_what_can_go_wrong_is_told_apart(case: str, code: int, message: str, world: World) -> None:
    world.hub.repos["me/x"] = {}
    world.hub.commit("me/x", {FILE: world.file.read_bytes()})
    world.hub.repos["other/x"] = {}
    env: dict[str, str] = {}
    token: str | None = TOKEN
    args: tuple[object, ...] = ("pull", "hf://me/x", "-o", "x.safetensors")
    if case == "gated":
        world.hub.gated.add("me/x")
    elif case == "missing":
        args = ("pull", "hf://me/y", "-o", "x.safetensors")
    elif case == "revision":
        args = ("pull", "hf://me/x@v9", "-o", "x.safetensors")
    elif case == "file":
        args = ("pull", "hf://me/x/b.safetensors", "-o", "x.safetensors")
    elif case == "private":
        world.hub.private.add("me/x")
        token = None
    elif case == "no token":
        args, token = ("push", world.file, "me/x"), None
    elif case == "no right":
        args = ("push", world.file, "other/x")
    elif case == "offline":
        env["HF_HUB_OFFLINE"] = "1"
    elif case == "down":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    else:
        args = ("pull", "hf://nowhere", "-o", "x.safetensors")
    done = world.run(*args, token=token, **env)
    assert done.returncode == code and message in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr
    assert not (world.folder / "x.safetensors").exists()


def test_a_patch_in_the_cache_needs_no_network(world: World) -> None:
    assert world.run("push", world.file, "me/x").returncode == 0
    assert world.run("pull", "hf://me/x", "-o", "a.safetensors").returncode == 0
    done = world.run("pull", "hf://me/x", "-o", "b.safetensors", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and (world.folder / "b.safetensors").read_bytes() == world.file.read_bytes()


def test_places() -> None:
    assert str(place_of("hf://a/b")) == "hf://a/b" and place_of("hf://a/b").file == FILE
    assert place_of("hf://a/b@v1.0").revision == "v1.0"
    found = place_of("hf://a/b@v1/sub/c.safetensors")
    assert (found.revision, found.file) == ("v1", "sub/c.safetensors") and str(found) == "hf://a/b@v1/sub/c.safetensors"
    found = place_of("hf://a/b@refs/pr/1/c.safetensors")
    assert (found.revision, found.file) == ("refs/pr/1", "c.safetensors") and place_of(
        "hf://a/b@refs/pr/1"
    ).file == FILE
    for bad in ("hf://a", "hf://a/b/c.bin", "hf://a/b@", "hf://a/../b", "http://a/b"):
        with pytest.raises(UsageError, match="no place"):
            place_of(bad)


@pytest.mark.parametrize(
    "bad",
    [
        "me/x//y.safetensors", "a/b@rev//..", "a/b/./c.safetensors", "a/b@v1/", "./b", "a/..", "-a/b",
        "a--b/c", "a/b.git", f"a/{'b' * 200}", f"a/b/{'c/' * 200}d.safetensors", f"a/b@{'c' * 5000}", "a/b\n", "",
    ],
)  # fmt: skip
def test_odd_places(bad: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place"):
        remote_record(f"hf://{bad}")
    with pytest.raises(UsageError, match="no place"):
        pull(f"hf://{bad}", tmp_path / "p")
    if "@" not in bad and bad.count("/") == 1:
        with pytest.raises(UsageError, match="no repository"):
            push("nothing", bad)


def test_a_header_on_the_hub_is_checked_like_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world.file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    record = json.loads(header["__metadata__"]["mosectl"])

    def served(record: Any, entries: dict[str, Any] | None = None, size: int = len(data) - n) -> None:
        raw = json.dumps({"__metadata__": {"mosectl": json.dumps(record)}, **(entries or entries_of(header))}).encode()
        found = len(raw).to_bytes(8, "little") + raw, size + len(raw)
        monkeypatch.setattr("mosectl.hub.patches.remote_header", lambda *_: found)

    served(record)
    assert remote_record("hf://me/x")[0] == record
    fact = record["facts"][0]
    (name, entry), *rest = entries_of(header).items()
    others = dict(rest)
    for spoilt, message in (
        (({**record, "facts": [None]},), r"hf://me/x: record.facts\[0\]: must be an object, found null"),
        (({**record, "facts": "all"},), "facts: must be a list"),
        (({**record, "facts": [{k: v for k, v in fact.items() if k != "status"}]},), "missing or unknown: status"),
        (({k: v for k, v in record.items() if k != "method"},), "missing or unknown: method"),
        (({**record, "seed": 10**400},), "401 digits"),
        (({**record, "model": "\ud800"},), "surrogates"),
        (({**record, "metrics": {"scores": []}},), "metrics.scores: must be an object"),
        (([],), "must be an object"),
        ((record, {**others, "../x.R": entry}), "is not allowed"),
        ((record, {name: {**entry, "shape": None}}), "malformed tensor entry"),
        ((record, None, 10), "its header says"),
    ):
        served(*spoilt)
        with pytest.raises(PatchError, match=message):
            remote_record("hf://me/x")
    for raw, message in (
        (b"", "cut short"), (b"\xff" * 50, "cut short"), (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "nested deeper"),
    ):  # fmt: skip
        monkeypatch.setattr("mosectl.hub.patches.remote_header", lambda *_, raw=raw: (raw, len(raw)))
        with pytest.raises(PatchError, match=message):
            remote_record("hf://me/x")


def entries_of(header: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in header.items() if k != "__metadata__"}


def test_headers_of_any_length_are_asked_for_in_parts(world: World) -> None:
    """One longer than the first request, one that claims too much, one that is not there."""
    fact = replace(FACT, before="x" * 300_000)
    replace(world.patch, facts=(fact,)).save(world.file)
    world.hub.repos["me/x"] = {}
    world.hub.commit("me/x", {FILE: world.file.read_bytes()})
    done = world.run("inspect", "hf://me/x", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["facts"][0]["before"] == fact.before, done.stderr
    ranges = [h.get("Range") or h.get("range") for m, p, h in world.hub.asked if "/resolve/" in p]
    assert len(ranges) == 2 and all(ranges)
    world.hub.commit("me/x", {FILE: b"\xff" * 200})
    done = world.run("inspect", "hf://me/x")
    assert done.returncode == 5 and "not a safetensors file" in done.stderr


def test_the_card(world: World) -> None:
    shown = world.run("push", world.file, "me/x", "--dry-run", token=None)
    assert shown.returncode == 0 and not world.hub.repos and shown.stdout.startswith("---\n")
    card = card_of(replace(world.patch, model="meta-llama/Llama-3", revision="abc"), "me/x")
    assert "base_model: meta-llama/Llama-3\nbase_model_relation: adapter" in card and "@ `abc`" in card
    assert "Protocol `generation`" in card and "reliability 100.0%" in card and "mosectl apply hf://me/x" in card
    assert world.run("push", world.file, "nouser", "--dry-run").returncode == 2
    patch_for(world.base).save(world.folder / "q")
    assert "base_model" not in card_of(Patch.load(world.folder / "q"), "me/x"), "a folder's name is no hub id"
