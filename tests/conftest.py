"""Fixtures that several test files use; what they share otherwise is in support/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from support.models import make_tokenizer
from support.paths import ROOT


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSECTL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def shared() -> Path:
    """Real models and data beside the checkout; not part of the project."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("no ../shared: real models and data are not part of the project")
    return folder


@pytest.fixture(scope="session")
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mosectl[eval]'")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training's editor."""
    from mosectl.hypernetwork.train import train
    from support.editors import FEW, TEXT, facts, loaded

    path = tmp_path_factory.mktemp("editor") / "horse.safetensors"
    train(loaded(), facts(), FEW, TEXT).save(path)
    return path
