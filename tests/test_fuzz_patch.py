"""Whatever a patch, a header on the Hub or an editor file holds: a documented error, or something that works.

MOSECTL_FUZZ sets how many examples each test tries.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosectl.checkpoints.inspection import inspect
from mosectl.errors import MosectlError
from mosectl.hub import cards, patches, place
from mosectl.hypernetwork import file as editor_file
from mosectl.hypernetwork.file import Editor
from mosectl.patch.change import Change
from mosectl.patch.compose import conflicts, diff, difference_tables, merge
from mosectl.patch.file import Patch, canonical, content_id, parsed
from mosectl.patch.fingerprint import distance, match
from mosectl.patch.record import KEY
from mosectl.render import inspection, terminal
from mosectl.render.console import tables
from support.patches import MODULE, compact_factors, make
from support.paths import ROOT
from support.spoiling import EXAMPLES, packed, spoil, unpacked

fuzz = settings(
    max_examples=EXAMPLES, deadline=10_000, suppress_health_check=list(HealthCheck), print_blob=True, database=None
)
CHANCE = st.integers(0, 2**64).map(random.Random)


def seeds() -> Iterator[Patch]:
    """Valid patches of every form, with all that a record may hold."""
    demo = Patch.load(ROOT / "patches" / "demo.safetensors")
    rich = {"options": demo.options, "metrics": {**demo.metrics, "compaction": {MODULE: 0.25}}}
    yield make(**rich)
    both = make(changes={MODULE: Change(compact_factors())}, side="both", **rich)
    yield both
    g = torch.Generator().manual_seed(0)
    added = {"A": torch.randn(2, 12, generator=g), "B": torch.randn(8, 2, generator=g)}
    yield make(changes={MODULE: Change(added)}, side="additive")
    yield merge([both, make()])
    yield merge([merge([both, make()]), make(seed=3)])


SEEDS = list(seeds())


class Files(list[bytes]):
    """Short in a failing test's report."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("seeds")
    for i, patch in enumerate(SEEDS):
        patch.save(folder / str(i))
    return Files((folder / str(i)).read_bytes() for i in range(len(SEEDS)))


def spoilt(data: bytes, key: str, tensors: dict[str, torch.Tensor], chance: random.Random) -> bytes:
    """A spoilt file; mostly with the id that its content asks for, so that what is deep inside is looked at."""
    header, record, body = unpacked(data, key)
    record = spoil(record, chance) if chance.random() < 0.9 else record
    if isinstance(record, dict) and chance.random() < 0.8:
        with suppress(ValueError):  # NaN, half a character
            record["id"] = content_id(canonical({k: v for k, v in record.items() if k != "id"}), tensors)
    return packed(header, key, record, body, chance)


def use(patch: Patch, file: Path, other: Patch) -> None:
    """All that is done with a patch without a model."""
    inspection.inspection(inspect(file))
    assert patch.record and cards.card_of(patch, "me/x")
    W = torch.ones(8, 12)
    for made_for in patch.base.values():
        match(made_for, W), match(made_for, W.bfloat16()), distance(made_for, W)
    with suppress(MosectlError):
        conflicts([other, patch])
        tables(difference_tables(diff(patch, other)))
    try:
        merged = merge([patch, other])
    except MosectlError:
        return
    merged.save(file)
    assert Patch.load(file).id == merged.id, "what is written can be read"


@pytest.mark.slow
@fuzz
@given(CHANCE)
def test_patches(files: Files, tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> None:
    i = chance.randrange(len(SEEDS))
    data = spoilt(files[i], KEY, SEEDS[i].tensors, chance)
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(data)
    try:
        patch = Patch.load(file)
    except MosectlError as e:
        assert (e.exit_code == 5 and e.what and str(e).isprintable()) or "\n" in str(e)
        with pytest.raises(MosectlError):
            parsed(io.BytesIO(data))
        return
    assert parsed(io.BytesIO(data)).id == patch.id
    use(patch, file, chance.choice(SEEDS))


@pytest.mark.slow
@fuzz
@given(CHANCE)
def test_headers_on_the_hub(files: Files, chance: random.Random) -> None:
    """What is read of a patch without its tensors; the server may lie about the size."""
    i = chance.randrange(len(SEEDS))
    data = spoilt(files[i], KEY, SEEDS[i].tensors, chance)
    size = chance.choice([len(data)] * 9 + [0, 2**40])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "remote_header", lambda *_: (data[:100_000], size))
        try:
            record, tensors = patches.remote_record("hf://me/x")
        except MosectlError as e:
            assert e.exit_code == 5
            return
    tables(patches.remote_tables("hf://me/x", record, tensors))
    json.dumps({**record, "tensors": tensors})


@pytest.mark.slow
@fuzz
@given(CHANCE)
def test_editors(trained: Path, tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> None:
    whole = Editor.load(trained)
    file = tmp_path_factory.getbasetemp() / "fuzzed-editor.safetensors"
    file.write_bytes(spoilt(trained.read_bytes(), editor_file.KEY, whole.tensors, chance))
    try:
        editor = Editor.load(file)
    except MosectlError as e:
        assert e.exit_code == 5
        return
    terminal.trained(editor)
    assert cards.editor_card(editor, "me/x") and editor.record
    weights = {name: torch.ones(*whole.base[name]["shape"]) for name in whole.modules}
    try:
        editor.check(weights)
    except MosectlError as e:
        assert e.exit_code == 6


PARTS = ["/", ".", "..", "@", "a", "me", "x-", "b.safetensors", ".safetensors", "refs", "pr", "\n", "é", "%2e"]
PLACES = st.one_of(
    st.text(), st.lists(st.sampled_from(PARTS)).map("".join), st.lists(st.sampled_from(PARTS)).map("/".join)
)


@pytest.mark.slow
@fuzz
@given(PLACES)
def test_places(text: str) -> None:
    try:
        found = place.place_of("hf://" + text)
    except MosectlError as e:
        assert e.exit_code == 2
        return
    assert place.place_of(str(found)) == replace(found) and ".." not in found.file.split("/")
    assert "//" not in f"{found.repo}/{found.file}" and len(found.file) <= 250
