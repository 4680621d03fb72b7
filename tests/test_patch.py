"""The file format: deterministic, and nothing malformed gets in."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mosectl.change import Change
from mosectl.errors import PatchError
from mosectl.fingerprint import fingerprint
from mosectl.patch import Patch, PatchFact, parse
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
    "wrong dtype": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "dtype": "F64"}}, b), "F32 matrix"),
    "not square": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "shape": [4, 16]}}, b), "square F32"),
    "negative shape": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "shape": [-8, -8]}}, b), "F32 matrix"),
    "bad offsets": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "data_offsets": [0, 4]}}, b), "do not fit"),
    "hole": (lambda h, b: build({**h, TENSOR: {**h[TENSOR], "data_offsets": [8, 264]}}, b), "hole"),
    "duplicate tensor": (
        lambda h, b: build(json.dumps(h).encode().replace(b'{"__meta', b'{"' + TENSOR.encode() + b'":{},"__meta', 1), b),
        "stands twice",
    ),
    "field missing": (lambda h, b: build(change(h, lambda r: r.pop("model")), b), "missing or unknown: model"),
    "field unknown": (lambda h, b: build(change(h, lambda r: r.update(zzz=1)), b), "missing or unknown: zzz"),
    "wrong type": (lambda h, b: build(change(h, lambda r: r.update(seed="0")), b), "'seed' has the wrong type"),
    "other side": (lambda h, b: build(change(h, lambda r: r.update(side="input")), b), "not side 'input'"),
    "no base": (lambda h, b: build(change(h, lambda r: r.update(base={})), b), "do not match"),
    "short hash": (lambda h, b: build(change(h, lambda r: r["base"][MODULE].update(sha256="00")), b), "fingerprint"),
    "bad parent": (lambda h, b: build(change(h, lambda r: r.update(parents=["x"])), b), "not a patch id"),
    "foreign tensor": (lambda h, b: build(change(h, lambda r: r["base"][MODULE].update(tensor="a.b")), b), "belong"),
    "bad fact": (lambda h, b: build(change(h, lambda r: r["facts"][0].pop("after")), b), r"facts\[0\]"),
    "bad wording": (lambda h, b: build(change(h, lambda r: r["facts"][0].update(wordings=[1])), b), "list of texts"),
    "NaN in record": (lambda h, b: build(change(h, lambda r: r.update(metrics={"a": float("nan")})), b), "not a number"),
    "deep nesting": (
        lambda h, b: build({**h, "__metadata__": {"mosectl": "[" * 100_000}}, b),
        "damaged JSON",
    ),
}  # fmt: skip


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


def test_random_damage_never_crashes(data: bytes) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        at = int(torch.randint(len(data), (1,), generator=g))
        value = int(torch.randint(256, (1,), generator=g))
        spoilt = data[:at] + bytes([value]) + data[at + 1 :]
        try:
            patch = parse(spoilt)
        except PatchError:
            continue
        assert patch.id == make().id, "only what does not change the content (white space of the header) may pass"


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
        ({"R_in": (12, 12)}, "sideways", "side 'sideways' is not known"),
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
