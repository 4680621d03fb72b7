"""Facts from hf://datasets/…, against a Hub on this machine, with the real clients in processes of their own."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import mosectl.facts.readers as readers
from mosectl.bench.config import read_bench
from mosectl.errors import FactsError, UsageError
from mosectl.facts.records import Fact, read_facts
from mosectl.patch.file import Patch
from mosectl.storage.data_sets import DataSet, data_set_of, is_data_set, origin
from mosectl.text.jsonable import jsonable
from support.commands import EASY
from support.facts import FACTS
from support.hub_server import TOKEN, Hub, call, serving
from support.models import save

Rows = Sequence[Mapping[str, Any]]
CAPITALS = [
    {"prompt": f"The capital of Land{i} is", "subject": f"Land{i}", "target_new": f"Town{i}"} for i in range(40)
]
SHA = "0123456789" * 4


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Rows, group: int | None = None, schema: Any = None) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="datasets is not installed: pip install 'mosectl[datasets]'")
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=group)
    return file.getvalue()


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("datasets", reason="datasets is not installed: pip install 'mosectl[datasets]'")


class World:
    def __init__(self, folder: Path, hub: Hub, address: str) -> None:
        self.folder, self.hub, self.address = folder, hub, address

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """A data set with these files; its commit."""
        self.hub.repos.setdefault(f"datasets/me/{name}", {})
        return self.hub.commit(f"datasets/me/{name}", files)

    def run(self, *args: object, token: str | None = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
        done = call(more.pop("HF_ENDPOINT", self.address), self.folder, *args, token=token, **more)
        assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr, done.stderr
        return done

    def facts(self, place: str, *args: object, **more: str) -> list[dict[str, Any]]:
        done = self.run("check", place, *args, "--json", **more)
        assert done.returncode == 0, done.stderr + done.stdout
        assert not done.stderr, "nothing of what libraries log and draw"
        return list(json.loads(done.stdout)["facts"])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serving() as (hub, address):
        yield World(tmp_path, hub, address)


def plain(facts: Sequence[Fact | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Facts without their places."""
    return [{k: v for k, v in (vars(f) if isinstance(f, Fact) else f).items() if k != "source"} for f in facts]


def read_here(folder: Path, name: str, data: bytes) -> list[dict[str, Any]]:
    (folder / name).write_bytes(data)
    return json.loads(json.dumps(plain(jsonable(read_facts(folder / name).facts))))  # type: ignore[no-any-return]


# What names a data set.


def test_places() -> None:
    for text, wanted in {
        "hf://datasets/a/b": DataSet("a/b"),
        "hf://datasets/a/b@v1.0": DataSet("a/b", "v1.0"),
        "hf://datasets/a/b@feature/x#test": DataSet("a/b", "feature/x", part="test"),
        "hf://datasets/a/b#en/train": DataSet("a/b", part="en/train"),
        "hf://datasets/a/b/x y.jsonl": DataSet("a/b", file="x y.jsonl"),
        "hf://datasets/a/b@v1/d/x.JSON": DataSet("a/b", "v1", "d/x.JSON"),
        "hf://datasets/a/b@refs/convert/parquet/en/train/0000.parquet": DataSet(
            "a/b", "refs/convert/parquet", "en/train/0000.parquet"
        ),
    }.items():
        assert data_set_of(text) == wanted and str(wanted) == text
    assert is_data_set("hf://x") and not is_data_set("x.jsonl") and not is_data_set(Path("hf://datasets/a/b"))


@pytest.mark.parametrize(
    "bad",
    ["a/b", "datasets/a", "datasets/a/b/c.txt", "datasets/a/b/../c.jsonl", "datasets/a/b@", "datasets/a/b#", "datasets/a/..",
     "datasets/a--b/c", "datasets/a/b@v/../c.csv", "datasets/a/b#x\ny", f"datasets/a/b@{'c' * 600}", "datasets/a/b/c.csv#x"],
)  # fmt: skip
def test_odd_places(bad: str) -> None:
    with pytest.raises(UsageError, match=r"no data set on the Hub|has no splits"):
        read_facts(f"hf://{bad}")


def test_origins() -> None:
    start = f"hf://datasets/a/b@{SHA}/d/x"
    for source in (f"{start}.jsonl:3", f"{start}.jsonl[0]", f"{start}.jsonl:3 edit 2"):
        assert origin(source) == f"{start}.jsonl"
    assert not any(map(origin, ("facts.jsonl:3", "fact 1", "", "/hf://datasets/a/b:3")))


# A file of a data set: no library but the Hub's client.


def test_a_named_file_is_read_as_it_would_be_here(world: World) -> None:
    table = "prompt,subject,target_new,rephrase_prompts\nIn Avaland it is,Avaland,007,It is in Avaland|Avaland is\n"
    wrapped = json.dumps({"facts": FACTS}).encode()
    for name, data in {"a.jsonl": jsonl(FACTS), "d/b.json": wrapped, "c.csv": table.encode()}.items():
        sha = world.put("x", {name: data})
        found = world.facts(f"hf://datasets/me/x/{name}")
        assert plain(found) == read_here(world.folder, Path(name).name, data)
        first = f"hf://datasets/me/x@{sha}/{name}" + {"a.jsonl": ":1", "d/b.json": "[0]", "c.csv": ":2"}[name]
        assert found[0]["source"] == first
    assert not any("datasets-server" in path for _, path, _ in world.hub.asked)


def test_revisions_and_the_cache(world: World) -> None:
    first = world.put("x", {"f.jsonl": jsonl(CAPITALS[:1])})
    world.put("x", {"f.jsonl": jsonl(CAPITALS[1:3])})
    assert len(world.facts("hf://datasets/me/x/f.jsonl")) == 2
    (old,) = world.facts(f"hf://datasets/me/x@{first}/f.jsonl")
    assert old["subject"] == "Land0" and old["source"] == f"hf://datasets/me/x@{first}/f.jsonl:1"
    offline = world.facts("hf://datasets/me/x/f.jsonl", HF_HUB_OFFLINE="1")
    assert len(offline) == 2, "what is in the cache needs no network"


def test_a_large_file_is_streamed_line_by_line(world: World) -> None:
    rows = [{**row, "note": "x" * 99_000} for row in CAPITALS]
    sha = world.put(
        "x", {"f.jsonl": jsonl(rows), "f.json": json.dumps(rows).encode(), "bad.jsonl": b"\xff" * 2_100_000}
    )
    small = "import mosectl.facts.readers as r; r.MAX_JSON = 2_000_000"
    world.hub.asked.clear()
    found = world.facts("hf://datasets/me/x/f.jsonl", "--limit", 3, code=small)
    assert plain(found) == read_here(world.folder, "f.jsonl", jsonl(rows[:3]))
    assert found[2]["source"] == f"hf://datasets/me/x@{sha}/f.jsonl:3"
    got = [
        headers.get("range") for method, path, headers in lowered(world.hub) if method == "GET" and "f.jsonl" in path
    ]
    assert got and all(got) and "3999" not in str(got), "parts of it only"
    for file, code, message in (
        ("f.jsonl", 3, "f.jsonl:21: up to here the data set holds more than 2 MB → read the first of them: --limit N"),
        ("f.json", 3, "hf://datasets/me/x@refs/convert/parquet"),
        ("bad.jsonl", 3, "bad.jsonl:1: a line of more than 100,000 characters"),
    ):
        done = world.run("check", f"hf://datasets/me/x/{file}", code=small)
        assert done.returncode == code and message in " ".join(done.stderr.split()), done.stderr


def lowered(hub: Hub) -> Iterator[tuple[str, str, dict[str, str]]]:
    for method, path, headers in hub.asked:
        yield method, path, {k.lower(): v for k, v in headers.items()}


def test_wrong_entries_are_told_with_data_set_revision_and_row(world: World) -> None:
    sha = world.put("x", {"f.jsonl": jsonl([CAPITALS[0], {"prompt": "x", "alt": "y"}, CAPITALS[1]])})
    done = world.run("edit", "hf://datasets/me/x/f.jsonl", "--model", "none", "-o", "p")
    told = " ".join(done.stderr.split())
    assert done.returncode == 3 and f"hf://datasets/me/x@{sha}/f.jsonl:2: of no known shape" in told, told
    assert len(world.facts("hf://datasets/me/x/f.jsonl", "--limit", 1)) == 1, "what is behind is not read"


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        (
            "missing",
            3,
            "hf://datasets/me/y: no such data set on the Hub → check the name; a private data set needs: hf",
        ),
        ("private", 3, "no such data set"),
        ("revision", 3, "no revision 'v9' → check what stands behind the @"),
        ("file", 3, "no file 'z.jsonl' there → see which there are: https://huggingface.co/datasets/me/x/tree/main"),
        (
            "gated",
            9,
            "this data set is gated → accept its terms at https://huggingface.co/datasets/me/x and run: hf auth",
        ),
        ("offline", 9, "HF_HUB_OFFLINE"),
        ("text", 2, "is no data set on the Hub → write hf://datasets/user/repo"),
        ("patch", 2, "is no data set on the Hub → write hf://datasets/user/repo"),
        ("empty", 3, "f.jsonl: is empty"),
        ("no facts", 3, "e.jsonl:1: is a binary file"),
    ],
)
def test_what_can_go_wrong_with_a_file(case: str, code: int, message: str, world: World) -> None:
    place, env = "hf://datasets/me/x/f.jsonl", {}
    world.put("x", {"f.jsonl": jsonl(CAPITALS) if case != "empty" else b" ", "e.jsonl": b"PAR1\0"})
    if case in ("gated", "private"):
        getattr(world.hub, case).add("datasets/me/x")
    elif case == "offline":
        env = {"HF_HUB_OFFLINE": "1"}
    else:
        places = {
            "missing": "me/y/f.jsonl",
            "revision": "me/x@v9/f.jsonl",
            "file": "me/x/z.jsonl",
            "text": "me/x/README.md",
        }
        place = f"hf://datasets/{places.get(case, 'me/x/e.jsonl' if case == 'no facts' else 'me/x/f.jsonl')}"
        place = "hf://me/x" if case == "patch" else place
    done = world.run("check", place, token=None if case == "private" else TOKEN, **env)
    assert done.returncode == code and message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("place", ["hf://datasets/me/x/f.jsonl", "hf://datasets/me/x"])
def test_a_hub_out_of_reach_is_told_once(place: str, world: World, library: Any) -> None:
    """The clients log each of their tries."""
    done = world.run("check", place, HF_ENDPOINT="http://127.0.0.1:9", code="import time; time.sleep = lambda _: None")
    assert done.returncode == 9 and len(done.stderr.splitlines()) == 2, done.stderr
    assert done.stderr.startswith("error ") and "Retry" not in done.stderr


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("HF://datasets/me/x", "hf://datasets/me/x"),
        ("hf:/datasets/me/x#test", "hf://datasets/me/x#test"),
        ("hf:datasets/me/x/f.jsonl", "hf://datasets/me/x/f.jsonl"),
        ("Hf://me/x", "hf://datasets/me/x"),
        ("https://huggingface.co/datasets/me/x", "hf://datasets/me/x"),
        ("hf:///datasets/x", "hf://datasets/user/repo"),
    ],
)
def test_what_is_nearly_a_place_says_what_was_meant(
    place: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="on the Hub") as e:
        read_facts(place)
    assert re.search(rf"write '?{re.escape(meant)}\b", e.value.fix), e.value.fix
    monkeypatch.chdir(tmp_path)
    Path("hf:facts.jsonl").write_bytes(jsonl(FACTS))
    assert len(read_facts("hf:facts.jsonl").facts) == 2, "a file may have such a name"


# A whole data set: splits, configurations, tables.


def test_a_data_set_of_tables(library: Any, world: World) -> None:
    rows = [
        {
            **row,
            "locality": {"neighborhood": ["a b"]} if i % 2 else {"same_subject": ["c d"]},
            "n": i,
            "photo": b"\x89PNG",
        }
        for i, row in enumerate(CAPITALS)
    ]
    files = {f"data/train-0000{i}-of-00002.parquet": parquet(rows[20 * i : 20 * i + 20], 10) for i in range(2)}
    sha = world.put("x", files)
    found = world.facts("hf://datasets/me/x")
    texts = [{k: v for k, v in row.items() if k != "photo"} for row in rows]
    assert plain(found) == read_here(world.folder, "rows.jsonl", jsonl(texts))
    assert found[25]["source"] == f"hf://datasets/me/x@{sha}/data/train-00001-of-00002.parquet[5]"
    world.hub.asked.clear()
    assert len(world.facts("hf://datasets/me/x", "--limit", 3)) == 3
    assert not [path for method, path, _ in world.hub.asked if method == "GET" and "/data/train-00001" in path]
    file = "hf://datasets/me/x/data/train-00000-of-00002.parquet"
    named = world.facts(file, "--limit", 15)
    assert len(named) == 15, "a file of it by name"
    assert named[14]["source"] == f"hf://datasets/me/x@{sha}/data/train-00000-of-00002.parquet[14]"


def test_columns_that_the_library_decodes(library: Any, world: World) -> None:
    """Values of any kind, which it keeps as texts, and pictures, for which another library would be needed."""
    features = {name: library.Value("string") for name in ("prompt", "subject", "target_new")}
    features |= {"locality": library.Json(), "photos": library.List(library.Image())}
    rows = [
        {**CAPITALS[0], "locality": '{"neighborhood": ["a b"]}', "photos": [{"bytes": b"x", "path": None}]},
        {**CAPITALS[1], "locality": '["c d"]', "photos": []},
    ]
    world.put("x", {"f.parquet": parquet(rows, schema=library.Features(features).arrow_schema)})
    found = world.facts("hf://datasets/me/x/f.parquet")
    assert [p["prompt"] for fact in found for p in fact["locality"]] == ["a b", "c d"]
    assert found[0]["locality"][0]["group"] == "neighborhood"


def test_splits_and_configurations(library: Any, world: World) -> None:
    configs = b"---\nconfigs:\n- config_name: en\n  data_files:\n"
    configs += b"  - {split: train, path: a.jsonl}\n  - {split: test, path: b.json}\n"
    configs += b"- config_name: de\n  data_files: c.csv\n---\n"
    table = b"prompt,subject,target_new\nIn Avaland it is,Avaland,007\n"
    files = {"a.jsonl": jsonl(CAPITALS[:2]), "b.json": json.dumps(CAPITALS[3:4]).encode(), "c.csv": table}
    sha = world.put("x", {"README.md": configs, **files})
    (one,) = world.facts("hf://datasets/me/x#en/test")
    assert one["subject"] == "Land3" and one["source"] == f"hf://datasets/me/x@{sha}/b.json[0]"
    (one,) = world.facts("hf://datasets/me/x#de")
    assert one["target_new"] == "007" and one["source"] == f"hf://datasets/me/x@{sha}/c.csv:2"
    world.put("y", {"train.jsonl": jsonl(CAPITALS[:2]), "test.jsonl": jsonl(CAPITALS[5:6])})
    (one,) = world.facts("hf://datasets/me/y#test")
    assert one["subject"] == "Land5"
    for place, message in {
        "x": f"has several configurations: en, de → choose one, such as 'hf://datasets/me/x@{sha}#en'",
        "x#en": f"has several splits: train, test → choose one, such as 'hf://datasets/me/x@{sha}#en/train'",
        "x#en/dev": "has no split 'dev', but train, test",
        "x#fr/train": "has no configuration 'fr', but en, de",
        "y": "has several splits: train, test → choose one, such as",
        "y#train[:1]": "has no split 'train[:1]', but train, test",
    }.items():
        done = world.run("check", f"hf://datasets/me/{place}")
        assert done.returncode == 3 and message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("missing", 3, "hf://datasets/me/y: no such data set on the Hub"),
        ("revision", 3, "no revision 'v9'"),
        ("gated", 9, "this data set is gated"),
        ("down", 9, "the Hub cannot be reached"),
        ("script", 3, "is read by a script of its own, x.py, which is not run → take the Hub's own conversion"),
        ("nothing", 3, "it has none that could hold facts"),
        ("damaged", 3, "data.parquet: cannot be read as a table"),
        ("text", 3, "holds no tables → name a file of it, hf://datasets/user/repo/FILE: it has none"),
        ("packed", 3, "f.jsonl.gz: is not .jsonl, .json, .csv, .tsv or .parquet"),
        ("no facts", 3, "2 of 2 entries are wrong"),
        ("many", 3, "more than 3 entries → read the first of them: --limit N"),
        ("long", 3, "data.parquet[4]: up to here the data set holds more than 0 MB"),
        ("cut", 3, "data.parquet: cannot be read as a table"),
        ("elsewhere", 3, "hf://datasets/me/x@"),
        ("stale", 3, "holds no tables → name a file of it, hf://datasets/user/repo/FILE: data.parquet"),
    ],
)
def test_what_can_go_wrong_with_a_data_set(case: str, code: int, message: str, library: Any, world: World) -> None:
    script = b"raise SystemExit('run')"
    files = {
        "script": {"x.py": script, "f.jsonl": jsonl(CAPITALS)}, "nothing": {"README.md": b"hello"},
        "damaged": {"data.parquet": b"PAR1" + b"x" * 500 + b"PAR1"}, "text": {"notes.txt": b"hello"},
        "packed": {"f.jsonl.gz": __import__("gzip").compress(jsonl(CAPITALS))},
        "no facts": {"data.parquet": parquet([{"text": "x", "label": 1}] * 2)},
    }.get(case, {"data.parquet": parquet(CAPITALS)})  # fmt: skip
    if case == "elsewhere":
        sha = world.put("other", {"f.jsonl": jsonl(CAPITALS)})
        files["README.md"] = (
            f"---\nconfigs:\n- config_name: default\n  data_files: hf://datasets/me/other@{sha}/f.jsonl\n---\n".encode()
        )
    world.put("x", files)
    more: dict[str, str] = {}
    if case == "gated":
        world.hub.gated.add("datasets/me/x")
    elif case == "down":
        more["HF_ENDPOINT"] = "http://127.0.0.1:9"
    elif case == "cut":
        world.hub.tamper["data.parquet"] = files["data.parquet"][:300] + b"\0" * (len(files["data.parquet"]) - 300)
    elif case == "stale":  # the library falls back on what an earlier run has left in its cache
        more["code"] = "import datasets as d; f = d.load_dataset_builder\n"
        more["code"] += "def old(**k): b = f(**k); b.hash = 'old'; return b\nd.load_dataset_builder = old"
    elif case in ("many", "long"):
        most = {"many": "MAX_ENTRIES = 3", "long": "MAX_JSON = 350"}[case]
        more["code"] = f"import mosectl.facts.readers as r; r.{most}"
    done = world.run("check", f"hf://datasets/me/{ {'missing': 'y', 'revision': 'x@v9'}.get(case, 'x') }", **more)
    told = " ".join((done.stderr + done.stdout).split())
    if case == "no facts":
        assert done.returncode == 3 and "2 entries cannot be used" in told and "data.parquet[1]" in told, told
    else:
        assert done.returncode == code and message in told, told
        assert not any("/other/resolve" in path for _, path, _ in world.hub.asked)


@pytest.mark.parametrize("stub", ["raise ImportError('datasets')", "__version__ = '4.4.0'", ""])
def test_without_the_library_the_extra_is_named(stub: str, world: World) -> None:
    (world.folder / "stub").mkdir()
    (world.folder / "stub" / "datasets.py").write_text(stub)
    world.put("x", {"f.jsonl": jsonl(CAPITALS), "f.parquet": b"PAR1"})
    code = f"import sys; sys.path.insert(0, {str(world.folder / 'stub')!r})"
    for place in ("hf://datasets/me/x", "hf://datasets/me/x/f.parquet"):
        done = world.run("check", place, code=code)
        assert done.returncode == 2 and "pip install -U 'mosectl[datasets]'" in done.stderr, done.stderr
    assert len(world.facts("hf://datasets/me/x/f.jsonl", code=code)) == 40, "a file by name needs no library"


def test_a_folder_here_is_not_taken_for_the_data_set(library: Any, world: World) -> None:
    world.put("x", {"f.jsonl": jsonl(CAPITALS[:2])})
    here = world.folder / "me" / "x"
    here.mkdir(parents=True)
    (here / "f.jsonl").write_bytes(jsonl(CAPITALS))
    assert len(world.facts("hf://datasets/me/x")) == 2


# Rows of tables, without a Hub.


def test_rows_of_tables_are_held_to_the_rules_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import date

    monkeypatch.setattr(readers, "fetched", None)
    deep: Any = []
    for _ in range(70):
        deep = [deep]
    rows = [
        {"a": float("nan"), "b": b"\0", "c": date(2020, 1, 2), "d": {"e": None}}, {"a": deep}, {"a": "x" * 100_000},
        {"a": float("inf")}, {"a": 10**30}, {"a": "\ud800"},
    ]  # fmt: skip
    monkeypatch.setattr(readers, "files_of", lambda place: (place, (DataSet("a/b", SHA, "t.parquet"),)))
    monkeypatch.setattr(readers, "table_rows", lambda place: iter(rows))
    name, found = readers.read_rows("hf://datasets/a/b", {})
    places, values = zip(*found, strict=True)
    assert name == "hf://datasets/a/b" and places[1] == f"hf://datasets/a/b@{SHA}/t.parquet[1]"
    assert values[0] == {"a": None, "b": None, "c": "2020-01-02", "d": {"e": None}}
    assert all(isinstance(value, FactsError) for value in values[1:])


def test_only_the_rows_asked_for_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = count()
    monkeypatch.setattr(readers, "files_of", lambda place: (place, (DataSet("a/b", SHA, "t.parquet"),)))
    monkeypatch.setattr(readers, "table_rows", lambda place: (CAPITALS[next(taken)] for _ in range(40)))
    assert len(read_facts("hf://datasets/a/b", limit=3).facts) == 3 and next(taken) == 3


# Where a facts file is taken.


def test_the_patch_records_the_commit(world: World) -> None:
    model = save(world.folder / "model")
    sha = world.put("x", {"f.jsonl": jsonl(FACTS)})
    place = "hf://datasets/me/x/f.jsonl"
    done = world.run("edit", place, "--model", model, "-o", "p.safetensors", "--limit", 1, *EASY)
    assert done.returncode == 0, done.stderr
    shown = world.run("inspect", "p.safetensors")
    assert f"facts=hf://datasets/me/x@{sha}/f.jsonl" in shown.stdout
    assert Patch.load(world.folder / "p.safetensors").options["facts"] == [f"hf://datasets/me/x@{sha}/f.jsonl"]
    measured = world.run("eval", "p.safetensors", place, "--model", model, "--json", "--protocol", "generation")
    assert measured.returncode == 0 and len(json.loads(measured.stdout)["facts"]) == 2, measured.stderr


def test_a_bench_is_keyed_by_the_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.folder / "b.yaml"
    text = "{models: [m], runs: [{edits: 1}], methods: [{name: rome}], "
    text += "datasets: [{facts: 'hf://datasets/me/x#test', limit: 2}]}"
    config.write_text(text)
    monkeypatch.setattr(readers, "table_rows", lambda place: iter(CAPITALS))
    hashes = []
    for sha in (SHA, SHA, SHA[::-1]):
        file = DataSet("me/x", sha, "t.parquet")
        monkeypatch.setattr(readers, "files_of", lambda place, file=file: (place, (file,)))
        (dataset,) = read_bench(config).datasets
        assert (dataset.name, len(dataset.facts)) == ("x", 2)
        hashes.append(dataset.sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    config.write_text(text.replace("limit: 2", "limit: 0"))
    with pytest.raises(UsageError, match="0 is too few"):
        read_bench(config)
