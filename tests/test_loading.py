"""In which type a model's weights are loaded."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from mosectl.errors import UsageError
from mosectl.model.loading import pick_dtype


@pytest.mark.parametrize(
    ("stored", "device", "ability", "taken"),
    [
        ("bfloat16", "cpu", "avx512_bf16", torch.bfloat16),
        ("bfloat16", "cpu", "amx_bf16", torch.bfloat16),
        ("bfloat16", "cpu", "avx512_f", torch.float32),
        ("float16", "cpu", "avx512_bf16", torch.float32),
        ("float32", "cpu", "avx512_bf16", torch.float32),
        (None, "cpu", "avx512_bf16", torch.float32),
        ("bfloat16", "cuda", "", torch.bfloat16),
        ("float16", "cuda", "", torch.float16),
        ("float32", "cuda", "", torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_auto(
    name: str, stored: str | None, device: str, ability: str, taken: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType({ability: True}), raising=False)
    assert pick_dtype("auto", device, {name: stored}) == taken


def test_an_older_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype("auto", "cpu", {"dtype": "bfloat16"}) == torch.float32


def test_what_is_asked_for_is_taken() -> None:
    assert pick_dtype("float32", "cpu", {"dtype": "bfloat16"}) == torch.float32
    assert pick_dtype("bfloat16", "cpu", {"dtype": "float32"}) == torch.bfloat16
    with pytest.warns(match="slow on a CPU"):
        assert pick_dtype("float16", "cpu", {}) == torch.float16
    with pytest.raises(UsageError, match="no such type"):
        pick_dtype("int8", "cpu", {})
