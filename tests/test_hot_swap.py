"""Exported adapters changed for one another in one process, through PEFT: each gives its patch's logits, and going back
gives the first's exactly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mosectl.checkpoints.export import RANKS, export
from mosectl.checkpoints.live import patched
from mosectl.model.loading import load
from mosectl.patch.file import Patch
from support.commands import run
from support.patches import patch_for, small
from support.paths import DEMO, ROOT

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model has not been trained")
IDS = torch.tensor([[5, 9, 2, 31, 7, 11, 3]])
SMALL, LARGE = 8, 32  # ranks of the two adapters
Two = tuple[Path, Path, torch.Tensor, torch.Tensor]  # adapters, and the logits of the patched models


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def demo() -> Any:
    return load(DEMO, dtype="float32").model  # its file has bfloat16, which rounds what is compared here


def expected(patch: Patch) -> torch.Tensor:
    model = demo()
    with patched(model, patch):
        return logits(model)


def turned(layers: tuple[int, ...], rank: int, seed: int) -> Patch:
    return small(patch_for(DEMO, layers, seed), rank, seed)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """The same layers, another rank: what two edits of one model have."""
    folder = tmp_path_factory.mktemp("adapters")
    patches = [turned((1, 2), r, seed) for seed, r in enumerate((4, 12))]
    for patch, name, rank in zip(patches, ("first", "second"), (SMALL, LARGE), strict=True):
        patch.save(folder / f"{name}.safetensors")
        out = folder / name
        assert run("export", folder / f"{name}.safetensors", "--model", DEMO, "--to", "lora", "-o", out) == 0
        assert peft.PeftConfig.from_pretrained(out).r == rank
    a, b = map(expected, patches)
    assert float((a - b).abs().max()) > 0.1 and float((logits(demo()) - a).abs().max()) > 0.1
    return folder / "first", folder / "second", a, b


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, atol=2e-5, rtol=1e-5)


def test_two_adapters_side_by_side(two: Two) -> None:
    first, second, a, b = two
    model = peft.PeftModel.from_pretrained(demo(), first, adapter_name="first")
    begun = logits(model)
    model.load_adapter(second, adapter_name="second")
    assert torch.equal(logits(model), begun), "loading is not switching"
    for _ in range(2):
        model.set_adapter("second")
        assert near(logits(model), b)
        model.set_adapter("first")
        assert near(logits(model), a) and torch.equal(logits(model), begun)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(demo()))


@pytest.mark.parametrize("prepared", [None, LARGE, 64])
@pytest.mark.parametrize("smaller_first", [True, False])
def test_an_adapter_swapped_in_place(two: Two, smaller_first: bool, prepared: int | None) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    first, second, a, b = two if smaller_first else (two[1], two[0], two[3], two[2])
    model = peft.PeftModel.from_pretrained(demo(), first)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=prepared)
        shapes = {p.shape for name, p in model.named_parameters() if "lora_A" in name}
        assert {shape[0] for shape in shapes} == {prepared}
    begun = logits(model)
    assert near(begun, a)
    for _ in range(2):
        hotswap_adapter(model, str(second), adapter_name="default", torch_device="cpu")
        assert near(logits(model), b)
        hotswap_adapter(model, str(first), adapter_name="default", torch_device="cpu")
        assert torch.allclose(logits(model), begun, atol=2e-5, rtol=0)
        if prepared or not smaller_first:  # of one shape throughout: the same operations on the same numbers
            assert torch.equal(logits(model), begun)
    if prepared:
        assert {p.shape for name, p in model.named_parameters() if "lora_A" in name} == shapes, (
            "nothing is compiled anew"
        )


def test_other_layers_are_for_set_adapter(two: Two, tmp_path: Path) -> None:
    """PEFT swaps only what is there; fewer layers than before are fine."""
    from peft.utils.hotswap import hotswap_adapter

    first, _, a, _ = two
    fewer, more = turned((2,), 4, 7), turned((1, 2, 3), 4, 8)
    for patch, name in ((fewer, "fewer"), (more, "more")):
        assert export([patch], DEMO, tmp_path / name).rank in RANKS
    model = peft.PeftModel.from_pretrained(demo(), first)
    hotswap_adapter(model, str(tmp_path / "fewer"), adapter_name="default", torch_device="cpu")
    assert near(logits(model), expected(fewer))
    with pytest.raises(RuntimeError, match=r"unexpected keys.*layers\.3\."):
        hotswap_adapter(model, str(tmp_path / "more"), adapter_name="default", torch_device="cpu")
    model = peft.PeftModel.from_pretrained(demo(), first, adapter_name="first")
    model.load_adapter(tmp_path / "more", adapter_name="more")
    model.set_adapter("more")
    assert near(logits(model), expected(more))
    model.set_adapter("first")
    assert near(logits(model), a)


def test_what_the_documentation_shows(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text("utf-8")
    shown = page.split("### Several edits in one process\n", 1)[1].split("\n## ", 1)[0]
    code = "\n".join(line[4:] for line in re.findall(r"^    .*$", shown, re.M))
    assert "hotswap_adapter(" in code and "set_adapter(" in code
    demo().save_pretrained(tmp_path / "MODEL")
    for name, adapter in zip(("first", "second"), two, strict=False):
        (tmp_path / name).symlink_to(adapter, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {}
    exec(compile(code, "serve.md", "exec"), left)
    assert near(logits(left["model"]), two[3]), "the last thing it does is to swap the second in"
