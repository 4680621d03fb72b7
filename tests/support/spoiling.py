"""Files spoilt at any depth, for the fuzz tests of patches and editors."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from typing import Any

EXAMPLES = int(os.environ.get("MOSECTL_FUZZ", "300"))  # of each fuzz test; the slow run takes 10000
HUGE = 10**400  # an integer that no number of the machine holds
WRONG: tuple[Callable[[random.Random], Any], ...] = (
    lambda c: None, lambda c: "text", lambda c: "", lambda c: c.choice([0, 1, -1, 2**20, 2**40, 2**63, 10**19, HUGE, 1.5]),
    lambda c: -1e308, lambda c: [], lambda c: {}, lambda c: [[1]], lambda c: {"a": None}, lambda c: True, lambda c: "\ud800",
    lambda c: "\x1b]0;x\x07\x00", lambda c: "x" * 5000, lambda c: nested(c.choice([30, 70, 900])), lambda c: [None] * 70,
    lambda c: float("nan"), lambda c: "0" * 64, lambda c: {"id": "0" * 64},
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def place(value: Any, chance: random.Random) -> tuple[Any, Any] | None:
    """A (container, key) of a JSON value, found by walking down: a long list is no likelier than a short field."""
    found = None
    while isinstance(value, dict | list) and value and (found is None or chance.random() < 0.75):
        found = value, chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[found[1]]
    return found


def spoil(value: Any, chance: random.Random) -> Any:
    """One or two values of a JSON value replaced, dropped, added or renamed; a copy."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice([1, 1, 1, 2])):
        found = place(value, chance)
        if found is None:
            break
        container, key = found
        way = chance.randrange(6)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[chance.choice(["unknown", "", "x" * 3000, "id", "name", "\ud800"])] = container.pop(key)
        elif way == 2 and isinstance(container, list):
            container += [container[key]] * chance.choice([1, 70])
        else:
            container[key] = chance.choice(WRONG)(chance)
    return value


def packed(header: dict[str, Any], key: str, record: Any, body: bytes, chance: random.Random) -> bytes:
    """A safetensors file with this record under ``key``; sometimes its header or its bytes are spoilt too."""
    text = json.dumps(record)
    if chance.random() < 0.05:  # a name twice
        text = text.replace("{", '{"seed": 0, "seed": 1, ', 1)
    if chance.random() < 0.2:
        header = spoil(header, chance)
    raw = json.dumps({"__metadata__": {key: text}, **header}, ensure_ascii=chance.random() < 0.7)
    data = struct.pack("<Q", len(raw.encode(errors="surrogatepass"))) + raw.encode(errors="surrogatepass") + body
    if chance.random() < 0.1:
        at = chance.randrange(len(data))
        data = chance.choice([data[:at], data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :], data + data[at:]])
    return data


def unpacked(data: bytes, key: str) -> tuple[dict[str, Any], Any, bytes]:
    """Entries, record and tensors' bytes of a whole file."""
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    return header, json.loads(header.pop("__metadata__")[key]), data[8 + n :]


def mutated(value: Any, chance: random.Random) -> Any:
    """The value with something else at one place, at any depth."""
    inner = isinstance(value, dict | list) and value and chance.random() < 0.8
    if not inner:
        odd = [None, True, -1, 10**19, 1.5, float("nan"), "", "x\0\x1b[2J", [], {}, [[]], {"a": None}, "9" * 400]
        return chance.choice(odd)
    value = dict(value) if isinstance(value, dict) else list(value)
    at = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if chance.random() < 0.3:
        del value[at]
    else:
        value[at] = mutated(value[at], chance)
    return value


def flipped(data: bytes, chance: random.Random) -> bytes:
    """One bit changed, cut short, or longer."""
    at, kind = chance.randrange(len(data)), chance.randrange(4)
    if kind < 2:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    return data[:at] if kind == 2 else data + bytes(chance.randrange(1, 50))
