"""The file format: deterministic, and nothing malformed gets in."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mosectl.change import Change
from mosectl.errors import PatchError
from mosectl.fingerprint import fingerprint
from mosectl.patch import Patch, PatchFact
from mosectl.patch_reader import parse
from mosectl.rotation import nearest_rotation

MODULE = "model.layers.1.mlp.down_proj"


def make(d: int = 8, **changes: object) -> Patch:
    g = torch.Generator().manual_seed(0)
    R = nearest_rotation(torch.eye(d) + 0.1 * torch.randn(d, d, generator=g)).float()
    W = torch.randn(d, 12, generator=g)
    content = {
        "changes": {MODULE: Change({"R": R})}, "method": "mose", "side": "output", "options": {"rounds": 3}, "model": "pico",
        "revision": None, "model_type": "llama", "base": {MODULE: fingerprint(f"{MODULE}.weight", W)},
        "facts": (PatchFact("A is", "A", "b", "c", "b", 0.1, 0.9, "changed", ("A being",)),), "metrics": {"x": 1.5},
        "seed": 0, "versions": {"mosectl": "0.1.0"}, "parents": (),
    }  # fmt: skip
    return Patch(**{**content, **changes})  # type: ignore[arg-type]


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


def compact(**spoilt: object) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(8, 3, generator=g))[0]
    V = torch.linalg.qr(torch.randn(12, 2, generator=g))[0]
    Q, P = (nearest_rotation(torch.randn(n, n, generator=g)).float() for n in (3, 2))
    factors = {"U": U, "Q": Q, "U_in": V, "Q_in": P}
    return {name: f for name, f in {**factors, **spoilt}.items() if f is not None}  # type: ignore[misc]


def test_compact_rotations_are_read_and_checked(tmp_path: Path) -> None:
    good = make(changes={MODULE: Change(compact())}, side="both")
    good.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == good.id
    mixed = make(changes={MODULE: Change({**compact(U=None, Q=None), "R": torch.eye(8)})}, side="both")
    mixed.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == mixed.id
    c = compact()
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
        make(changes={MODULE: Change(compact(**spoilt))}, side="both").save(tmp_path / "bad")
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


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_spoilt_files_are_refused_or_the_same(form: str, tmp_path: Path) -> None:
    """None crashes, hangs, takes much memory, or is accepted with another content."""
    whole = make() if form == "dense" else make(changes={MODULE: Change(compact())}, side="both")
    whole.save(tmp_path / "p")
    data, chance, accepted = (tmp_path / "p").read_bytes(), random.Random(form), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTANTS):
        start = time.perf_counter()
        spoilt = mutant(data, chance)
        try:
            patch = parse(spoilt)
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
        parse(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])


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
