"""The file format: deterministic, and nothing malformed gets in."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mosectl.errors import PatchError
from mosectl.patch.change import Change
from mosectl.patch.file import Patch, parsed
from mosectl.patch.fingerprint import distance, fingerprint
from mosectl.storage.tensor_file import layout, metadata
from support.patches import MODULE, compact_factors, make
from support.paths import ROOT


def split(data: bytes) -> tuple[dict, bytes]:
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def build(header: dict | bytes, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    make().save(tmp_path / "p.safetensors")
    return (tmp_path / "p.safetensors").read_bytes()


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    patch = make()
    for name in ("a", "b"):
        patch.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = Patch.load(tmp_path / "a")
    assert back.id == patch.id and back.record == patch.record and len(patch.id) == 64
    assert back.facts == patch.facts
    assert torch.equal(back.changes[MODULE].factors["R"], patch.changes[MODULE].factors["R"])
    assert make(seed=1).id != patch.id
    assert (tmp_path / "a").stat().st_mode & 0o044, "others must be able to read it"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def change(header: dict, fn: Callable[[dict], None]) -> dict:
    record = json.loads(header["__metadata__"]["mosectl"])
    fn(record)
    header["__metadata__"]["mosectl"] = json.dumps(record)
    return header


def rename(header: dict, name: str) -> dict:
    return {name if k != "__metadata__" else k: v for k, v in header.items()}


def set_number(body: bytes, index: int, value: float) -> bytes:
    return body[: 4 * index] + struct.pack("<f", value) + body[4 * index + 4 :]


TENSOR = f"{MODULE}.R"
BAD: dict[str, tuple[Callable[[dict, bytes], bytes], str]] = {
    "empty": (lambda h, b: b"", "cut short"),
    "text": (lambda h, b: b"hello world, this is not a patch", "cut short|damaged"),
    "truncated": (lambda h, b: build(h, b[:-5]), "its header says"),
    "longer": (lambda h, b: build(h, b + b"\0" * 8), "its header says"),
    "huge header": (lambda h, b: struct.pack("<Q", 2**60) + b, "cut short"),
    "no record": (lambda h, b: build({k: v for k, v in h.items() if k != "__metadata__"}, b), "not a mosectl patch"),
    "two keys": (lambda h, b: build({**h, "__metadata__": {**h["__metadata__"], "x": "y"}}, b), "not a mosectl patch"),
    "future format": (lambda h, b: build(change(h, lambda r: r.update(format=2)), b), "unknown patch format 2"),
    "NaN": (lambda h, b: build(h, set_number(b, 3, float("nan"))), "NaN"),
    "infinity": (lambda h, b: build(h, set_number(b, 3, float("inf"))), "infinite"),
    "not orthogonal": (lambda h, b: build(h, set_number(b, 3, 0.5)), "not a rotation"),
    "path in name": (lambda h, b: build(rename(h, "../../etc/passwd.R"), b), "is not allowed"),
    "NUL in name": (lambda h, b: build(rename(h, "a\0.R"), b), "is not allowed"),
    "other kind": (lambda h, b: build(rename(h, f"{MODULE}.weight"), b), "is not allowed"),
    "wrong dtype": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "dtype": "F64"}}, b), "must be F32, found F64"),
    "not square": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "shape": [4, 16]}}, b), "square F32"),
    "negative shape": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "shape": [-8, -8]}}, b), r"shape\[0\]: must be"),
    "bad offsets": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "data_offsets": [0, 4]}}, b), "do not fit"),
    "hole": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "data_offsets": [8, 264]}}, b), "hole"),
    "duplicate tensor": (
        lambda h, b: build(json.dumps(h).encode().replace(b'{"__meta', b'{"' + TENSOR.encode() + b'":{},"__meta', 1), b),
        "stands twice",
    ),
    "field missing": (lambda h, b: build(change(h, lambda r: r.pop("model")), b), "missing or unknown: model"),
    "field unknown": (lambda h, b: build(change(h, lambda r: r.update(zzz=1)), b), "missing or unknown: zzz"),
    "wrong type": (lambda h, b: build(change(h, lambda r: r.update(seed="0")), b), "seed: must be a whole number"),
    "other side": (lambda h, b: build(change(h, lambda r: r.update(side="input")), b), "not side 'input'"),
    "no base": (lambda h, b: build(change(h, lambda r: r.update(base={})), b), "do not match"),
    "short hash": (lambda h, b: build(change(h, lambda r: r["base"][MODULE].update(sha256="00")), b), "must be a sha256"),
    "bad parent": (lambda h, b: build(change(h, lambda r: r.update(parents=["x"])), b), r"parents\[0\]: must be a sha256"),
    "foreign tensor": (lambda h, b: build(change(h, lambda r: r["base"][MODULE].update(tensor="a.b")), b), "belong"),
    "bad fact": (lambda h, b: build(change(h, lambda r: r["facts"][0].pop("after")), b), r"facts\[0\]"),
    "bad wording": (lambda h, b: build(change(h, lambda r: r["facts"][0].update(wordings=[1])), b), "must be a text"),
    "NaN in record": (lambda h, b: build(change(h, lambda r: r.update(metrics={"a": float("nan")})), b), "not a number"),
    "deep nesting": (
        lambda h, b: build({**h, "__metadata__": {"mosectl": "[" * 100_000}}, b),
        "damaged JSON",
    ),
}  # fmt: skip


def test_compact_rotations_are_read_and_checked(tmp_path: Path) -> None:
    good = make(changes={MODULE: Change(compact_factors())}, side="both")
    good.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == good.id
    mixed = make(changes={MODULE: Change({**compact_factors(U=None, Q=None), "R": torch.eye(8)})}, side="both")
    mixed.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == mixed.id
    c = compact_factors()
    flipped = c["Q"].clone()
    flipped[0] *= -1
    for spoilt, message in (
        ({"U": 1.01 * c["U"]}, "columns are not orthonormal"),
        ({"U": torch.randn(3, 8), "Q": torch.eye(8)}, "columns are not orthonormal"),
        ({"Q": flipped}, "reflection"),
        ({"Q": 2 * c["Q"]}, "not a rotation"),
        ({"Q": torch.eye(2)}, "does not fit"),
        ({"Q": torch.ones(3, 2)}, "must be a square"),
        ({"Q": None}, "not side 'both'"),
        ({"R": torch.eye(8)}, "not side 'both'"),
        ({"U_in": c["U"], "Q_in": c["Q"]}, "does not fit"),
        ({"U": torch.full((8, 3), torch.nan)}, "NaN"),
    ):
        make(changes={MODULE: Change(compact_factors(**spoilt))}, side="both").save(tmp_path / "bad")
        with pytest.raises(PatchError, match=message):
            Patch.load(tmp_path / "bad")


@pytest.mark.parametrize("kind", BAD)
def test_malformed_is_refused(kind: str, data: bytes, tmp_path: Path) -> None:
    spoil, message = BAD[kind]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(spoil(*split(data)))
    with pytest.raises(PatchError, match=message) as e:
        Patch.load(file)
    assert str(file) in e.value.where


def test_reflection_is_refused(tmp_path: Path) -> None:
    R = torch.eye(8)
    R[0, 0] = -1
    make(changes={MODULE: Change({"R": R})}).save(tmp_path / "r")
    with pytest.raises(PatchError, match="reflection"):
        Patch.load(tmp_path / "r")


MUTANTS = int(os.environ.get("MOSECTL_MUTANTS", "600"))


def mutant(data: bytes, chance: random.Random) -> bytes:
    """One of many ways to spoil a file: bytes, slices, numbers and words of the header, lengths."""
    at, to = sorted(chance.randrange(len(data)) for _ in range(2))
    n = struct.unpack("<Q", data[:8])[0]
    way = chance.randrange(7)
    if way == 0:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if way == 1:
        return data[:at] + data[to:]
    if way == 2:
        return data[:to] + data[at:to] + data[to:]
    if way == 3:
        return struct.pack("<Q", chance.choice([0, 1, n - 1, n + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    header = data[8 : 8 + n]
    if way == 4:  # a number becomes another: shapes, offsets, versions, probabilities
        numbers = list(re.finditer(rb"\d+", header))
        found = chance.choice(numbers)
        value = chance.choice(
            [b"0", b"-1", b"1", b"7", b"4294967296", b"9" * 40, b"1e999", b"NaN", b"1.5", b"null", b"[]"]
        )
    elif way == 5:  # a word
        found = chance.choice(list(re.finditer(rb"[A-Za-z_]{2,}", header)))
        value = chance.choice(
            [b"", b"R", b"U", b"Q_in", b"..", b"\\u0000", b"F64", b"BF16", b"x" * 500, b"\xff", b"__metadata__"]
        )
    else:  # a sign of the syntax
        found = chance.choice(list(re.finditer(rb"[\[\]{},:\"]", header)))
        value = chance.choice([b"", b"[", b"]", b"{", b"}", b",", b":", b'"', b"[" * 2000])
    header = header[: found.start()] + value + header[found.end() :]
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "compact"])
def test_spoilt_files_are_refused_or_the_same(form: str, tmp_path: Path) -> None:
    """None crashes, hangs, takes much memory, or is accepted with another content."""
    whole = make() if form == "dense" else make(changes={MODULE: Change(compact_factors())}, side="both")
    whole.save(tmp_path / "p")
    data, chance, accepted = (tmp_path / "p").read_bytes(), random.Random(form), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTANTS):
        start = time.perf_counter()
        spoilt = mutant(data, chance)
        try:
            patch = parsed(io.BytesIO(spoilt))
        except PatchError as e:
            assert e.what
        else:
            accepted += 1
            assert patch.id == whole.id, "only what does not change the content (white space of the header) may pass"
        assert time.perf_counter() - start < 5
    assert accepted < MUTANTS / 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000, "kilobytes"


def test_a_flipped_bit_is_found(data: bytes) -> None:
    with pytest.raises(PatchError, match="damaged or altered"):
        parsed(io.BytesIO(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]))


@pytest.mark.parametrize(
    ("factors", "side", "message"),
    [
        ({"A": (2, 12), "B": (8, 2)}, "additive", ""),
        ({"R_in": (12, 12)}, "input", ""),
        ({"A": (2, 12)}, "additive", "holds A, which is not side 'additive'"),
        ({"A": (2, 12), "B": (8, 3)}, "additive", "does not fit"),
        ({"A": (2, 11), "B": (8, 2)}, "additive", "does not fit"),
        ({"R_in": (11, 11)}, "input", "does not fit"),
        ({"R_in": (12, 12)}, "output", "is not side 'output'"),
        ({"R_in": (12, 12)}, "sideways", "'sideways' is not known"),
    ],
)
def test_sides(factors: dict[str, tuple[int, int]], side: str, message: str, tmp_path: Path) -> None:
    made = {k: torch.eye(*n) if k.startswith("R") else torch.ones(*n) for k, n in factors.items()}
    patch = make(changes={MODULE: Change(made)}, side=side)
    patch.save(tmp_path / "p")
    if message:
        with pytest.raises(PatchError, match=message):
            Patch.load(tmp_path / "p")
    else:
        assert Patch.load(tmp_path / "p").id == patch.id


# Below the first level


def altered(**fields: object) -> Callable[[dict], None]:
    """A change of the record: fields by their way, "facts.0.before"."""

    def change(record: dict) -> None:
        for way, value in fields.items():
            *parents, last = way.split("__")
            at = record
            for part in parents:
                at = at[int(part)] if isinstance(at, list) else at[part]
            at[last] = value

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics__scores": [1]}, "metrics.scores: must be an object"),
        ({"metrics__scores": {"unseen": {}}}, "metrics.scores.unseen: must be a text, a number"),
        ({"metrics__compaction": 3}, "metrics.compaction: must be an object"),
        ({"metrics__compaction": {MODULE: "much"}}, f"metrics.compaction.{MODULE}: must be a number"),
        ({"metrics__stability": {}}, "metrics.stability: must be a list"),
        ({"metrics__stability": [{}]}, r"metrics.stability\[0\]: fields missing or unknown: name"),
        ({"metrics__stability": [{"name": "x", "norm_drift": "0"}]}, r"stability\[0\].norm_drift: must be a number"),
        ({"options__merged": 3}, "options.merged: must be a list, found 3"),
        ({"options__merged": [{"id": "0" * 64}]}, r"options.merged\[0\]: fields missing"),
        ({"options__corpus": {"sha256": 1}}, "options.corpus.sha256: must be a text"),
        ({"options__solver": [1]}, "options.solver: must be an object"),
        ({"options__targets": {"steps": [[]]}}, "options.targets.steps: must be"),
        ({"options__layers": "auto"}, "options.layers: must be a list"),
        ({"options__chat": 1}, "options.chat: must be true or false"),
        ({"facts": [None]}, r"facts\[0\]: must be an object, found null"),
        ({"facts": {"a": 1}}, "facts: must be a list"),
        ({"facts__0__before": None}, r"facts\[0\].before: must be a text, found null"),
        ({"facts__0__probability_after": "0.5"}, r"facts\[0\].probability_after: must be a number"),
        ({"facts__0__probability_after": 10**400}, "an integer of 401 digits"),
        ({"facts__0__probability_after": True}, "must be a number, found true"),
        ({"facts__0__prompt": "\ud800"}, "surrogates"),
        ({"model": "\ud800"}, "surrogates"),
        ({"versions": {"torch": [2]}}, "versions.torch: must be a text"),
        ({"parents": "0" * 64}, "parents: must be a list"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({f"base__{MODULE}__sample": [0.5] * 63}, "malformed fingerprint: 63 entries"),
        ({f"base__{MODULE}__sample": [1e300] * 64}, "out of range"),
        ({f"base__{MODULE}__dtype": "F99"}, "'F99' is not known"),
        ({f"base__{MODULE}__shape": [8, 2**40]}, r"shape\[1\]: must be a whole number from 1 to"),
        ({"options": {"a": [[[[[[[[1]]]]]]]] * 700_000}}, "more than 5,000,000 values"),
        ({"options": None}, "options: must be an object, found null"),
    ],
)
def test_every_field_that_is_shown_or_used_is_checked(
    fields: dict[str, object], message: str, data: bytes, tmp_path: Path
) -> None:
    header, body = split(data)
    spoilt = build(change(header, altered(**fields)), body)
    with pytest.raises(PatchError, match=message) as e:
        parsed(io.BytesIO(spoilt))
    assert e.value.where.startswith(("record", "header"))


def test_options_and_metrics_may_hold_more_than_is_known(tmp_path: Path) -> None:
    patch = make(
        options={"later": [{"a": None}]}, metrics={"scores": {"protocol": "x", "later": 1}, "curve": [[0, 1.5]]}
    )
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == patch.id


def test_the_demo_patch_reads_as_ever() -> None:
    patch = Patch.load(ROOT / "patches" / "demo.safetensors")
    assert patch.id == "5ecde9d15a9bd00940bbaf20eeb029df4308cf328d794fc8164e1daca0033f3d" and len(patch.facts) == 24


# Small files of large claims


def sparse(path: Path, header: dict, size: int) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with path.open("r+b") as file:
        file.truncate(8 + len(raw) + size)
    return path


def test_pipes_devices_and_sparse_files(data: bytes, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(20 * 10**9)
    n = 40_000
    header, _ = split(data)
    record = change(header, altered(**{f"base__{MODULE}__shape": [n, 12]}))["__metadata__"]
    entry = {"dtype": "F32", "shape": [n, n], "data_offsets": [0, 4 * n * n]}
    sparse(tmp_path / "claims", {"__metadata__": record, TENSOR: entry}, 4 * n * n)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for name, message in (
        ("pipe", "not a regular file"), ("zeros", "not a safetensors file"), ("claims", "not a rotation|memory are free"),
        ("/dev/zero", "not a regular file"), (".", "is a folder"),
    ):  # fmt: skip
        with pytest.raises(PatchError, match=message):
            Patch.load(tmp_path / name)
        assert metadata(tmp_path / name) == {} or name == "claims"
    assert time.perf_counter() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1_000_000, "kilobytes"


def test_more_than_the_memory_holds(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosectl.storage.tensor_file.psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(PatchError, match=r"0\.0 GB of memory are free"):
        parsed(io.BytesIO(data))


def test_an_allocation_that_fails_is_told(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("mosectl.storage.tensor_file.torch.empty", full)
    with pytest.raises(PatchError, match="of memory are free"):
        parsed(io.BytesIO(data))


def test_tensors_fill_the_file_one_after_the_other() -> None:
    def entry(start: int, stop: int) -> dict[str, object]:
        return {"dtype": "F32", "shape": [1, (stop - start) // 4], "data_offsets": [start, stop]}

    assert list(layout({"b": entry(8, 12), "a": entry(0, 8)}, 12)) == ["a", "b"], "in the order of their bytes"
    for entries in (
        {"a": entry(0, 8), "b": entry(4, 12)}, {"a": entry(0, 4), "b": entry(8, 12)}, {"a": entry(4, 12)},
        {"a": entry(0, 12), "b": entry(0, 12)},
    ):  # fmt: skip
        with pytest.raises(PatchError, match="overlap or leave a hole"):
            layout(entries, 12)
    for size in (8, 16):
        with pytest.raises(PatchError, match="its header says 12"):
            layout({"a": entry(0, 12)}, size)


def test_many_names_take_no_time(data: bytes) -> None:
    start = time.perf_counter()
    names = ",".join(f'"a{i}":0' for i in range(40_000))
    with pytest.raises(PatchError, match="stands twice"):
        parsed(io.BytesIO(build(f'{{{names},"a39999":0}}'.encode(), b"")))
    header, body = split(data)
    with pytest.raises(PatchError, match="40,001 tensors, at most 4,096"):
        parsed(io.BytesIO(build({**header, **{f"a{i}.R": {} for i in range(40_000)}}, body)))
    with pytest.raises(PatchError, match="is not allowed"):
        parsed(io.BytesIO(build(rename(header, f"layers.{'9' * 5000}.R"), body)))
    assert time.perf_counter() - start < 5


def test_as_many_tensors_as_are_allowed(tmp_path: Path) -> None:
    names = [f"layers.{i}" for i in range(4_096)]
    made_for = fingerprint("x", torch.ones(1, 1))
    base = {name: replace(made_for, tensor=f"{name}.weight") for name in names}
    patch = make(changes={name: Change({"R": torch.ones(1, 1)}) for name in names}, base=base)
    patch.save(tmp_path / "p")
    start = time.perf_counter()
    assert list(Patch.load(tmp_path / "p").changes) == names
    assert time.perf_counter() - start < 10


def test_a_record_that_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosectl.patch.file.MAX_JSON", 1000)
    with pytest.raises(PatchError, match="a patch file holds"):
        make().save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_entries_as_large_as_float32_holds_are_still_far_away() -> None:
    made_for = replace(fingerprint("x", torch.ones(8, 8)), sample=(3.4e38,) * 64)
    assert distance(made_for, torch.ones(8, 8)) == pytest.approx(1.0), "not NaN, which no threshold refuses"
