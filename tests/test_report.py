"""`mosectl report`: what is found in a folder, what is left out and why, and what nobody's text can do to the page."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mosectl.checkpoints.apply import apply
from mosectl.errors import UsageError
from mosectl.measure.bootstrap import Measure
from mosectl.measure.evaluation_file import read_evaluation
from mosectl.measure.metrics import Metric
from mosectl.render import charts, html, page
from mosectl.render.console import in_one_unit
from mosectl.render.page import Mark, Page, Section, Words, table
from mosectl.report.folder import look_through
from mosectl.report.pages import render, summary
from mosectl.storage.schema import Misfit
from mosectl.storage.typed import typed
from mosectl.text.jsonable import jsonable
from support.commands import run
from support.models import save
from support.patches import make, patch_for
from support.reports import evaluation, fact, folder, patch, result

EVIL = "</td></style><script>window.x=1</script>\"'><img src=x onerror=window.x=1>\u202e{{7*7}}"


class Reader(HTMLParser):
    """Headings, tables (columns and rows of cells) and all tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tables: list[tuple[list[str], list[list[str]]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._into: list[str] | None = None
        self._closed = True  # the last tag
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._closed = False
        if tag == "table":
            self.tables.append(([], []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("th", "td"):
            self._into = self.tables[-1][0] if tag == "th" else self.tables[-1][1][-1]
            self._into.append("")
        elif tag in ("h1", "h2", "h3"):
            self._into = self.headings
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._closed = True
        if tag in ("th", "td", "h1", "h2", "h3"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and not self._closed:
            return
        self.text += data
        if self._into is not None:
            self._into[-1] += data

    def table(self, *columns: str) -> list[list[str]]:
        """The rows of the first table that has these columns."""
        return next([r for r in rows if r] for head, rows in self.tables if {*columns} <= {*head})


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("r") / "run")


def test_everything_in_a_folder_is_on_the_page(full: Path) -> None:
    found = look_through(full)
    read = Reader(render(found))
    first, second = (p.inspection.patch.id[:12] for p in found.patches)
    assert [h for h in read.headings if not h.startswith(("mosectl", "Patch "))] == [
        "Patches", "Conflicts",
        "Facts", "Missed facts", "Measured when it was made", "Old facts and new ones", "What the guard watches", "Spectrum",
        "Facts", "Measured when it was made", "What the guard watches", "Spectrum",
        "Evaluation eval.json", "Facts", "Metrics", "Shares", "What else changed", "Retention", "Text", "Next token",
        "Abilities", "Definitions", "Bench", "Runs that failed or were stopped", "Old facts and new ones", "Left out",
    ]  # fmt: skip
    assert f"Patch {first}" in read.headings and f"Patch {second}" in read.headings
    own = "own probes kept (QA)"
    rows = read.table("file", "patch", own, "size, kB")
    assert (rows[0][-2], rows[1][-2]) == ("12.4", "3.2")
    assert [r[:3] for r in rows] == [["first.safetensors", first, "mose"], ["second.safetensors", second, "mose"]]
    assert rows[0][4:10] == ["1", "31", "24", "25", "56.0%", "2.1e-08"], (
        "30 facts but the last of five, and one that changed"
    )
    assert rows[1][6] == "–", "one batch"
    (conflict,) = read.table("prompt", "objects")
    assert "'Port Vereville' in" in conflict[1] and "'New Harbour' in" in conflict[1]
    assert conflict[2:] == ["first.safetensors", "second.safetensors"]
    (order,) = read.table("weight", "in")
    assert order[0] == "1 mlp.down_proj" and float(order[3]) > 0.01
    facts = read.table("prompt", "held right after")
    assert facts[0][-2:] == ["held", "changed"] and facts[4][-2:] == ["did not hold", "not reached"]
    assert facts[30][3:5] == ["x", "y"] and facts[30][-2:] == ["did not hold", "changed"]
    assert read.table("prompt", "status") == [["A is", "B", "not reached"]]
    assert ["oldest 1-10", "reliability", "80.0%", "80.0%"] in [r[:4] for r in read.table("facts", "share")]
    assert read.table("what", "allowed")[0] == ["‖W‖, largest relative change", "1.6e-09", "1"]
    assert read.table("tensor")[0] == ["1 mlp.down_proj", "17.9", "13.8", "1.6e-09", "1.5e-08", "2.1e-08"]
    bench = read.table("method", "status")
    assert "/home" not in render(found) and "Before: base." in read.text and bench[0][1] == "pico", (
        "no path of a machine"
    )
    assert [r[-1] for r in bench] == ["stopped early", "failed"] and bench[0][3] == "30 facts 15 at a time"
    assert summary(found).startswith("2 patches with 32 facts: 26 held when made.")


def test_what_is_left_out_is_a_row_with_the_reason(full: Path) -> None:
    left = {f.file: (f.why, f.damaged) for f in look_through(full).left_out}
    assert left.keys() == {"short.safetensors", "model.safetensors", "other.json", "results.jsonl, line 3"}, (
        "config.json is a model's"
    )
    assert left["model.safetensors"] == ("no patch of mosectl's", False)
    assert left["other.json"] == ("JSON, and not an evaluation (mosectl eval --json)", False)
    assert "its header says" in left["short.safetensors"][0] and left["short.safetensors"][1]
    assert "missing" in left["results.jsonl, line 3"][0]
    assert {r[0] for r in Reader(render(look_through(full))).table("file", "why")} == left.keys()


def test_empty_rows_columns_and_sections_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    bare = make(facts=(replace(fact(0), right_after=None),), metrics={"shares": []}, options={})
    bare.save(tmp_path / "run" / "p.safetensors")
    read = Reader(render(look_through(tmp_path / "run")))
    assert read.headings[1:] == ["Patches", f"Patch {bare.id[:12]}", "Facts", "Spectrum"], "no conflict of one patch"
    head = next(head for head, _ in read.tables if "file" in head)
    assert not {"held right after", "largest σ drift"} & {*head} and not any("same subject" in name for name in head)
    page = Reader(html.render(evaluation()))
    assert "portability" not in page.text, "nothing was asked"
    assert "right after" in page.tables[1][0] and "nothing" not in page.text.lower()


def test_the_same_subject_by_two_kinds_of_prompts_is_two_columns(tmp_path: Path) -> None:
    share = {"metric": "locality", "group": "same_subject", "asked": 8, "strict": 0.25}
    (tmp_path / "run").mkdir()
    for name, found in (("a", [(False, 0.5), (True, 0.75)]), ("b", [(True, 0.125)])):
        shares = [{**share, "own": own, "qa": qa} for own, qa in found]
        patch(ord(name), (fact(0),), metrics={"shares": shares}).save(tmp_path / "run" / f"{name}.safetensors")
    read = Reader(render(look_through(tmp_path / "run")))
    head, rows = next((head, rows) for head, rows in read.tables if "file" in head)
    at = head.index("same subject kept (QA)")
    assert head[at + 1] == "own probes kept (QA)"
    assert [row[at : at + 2] for row in rows if row] == [["50.0%", "75.0%"], ["–", "12.5%"]]
    measured = read.table("metric", "share", "as QA compares")
    assert measured[0][:3] == ["same subject", "25.0%", "50.0%"]


def test_what_was_edited_at_once_has_no_retention() -> None:
    found = evaluation()
    at_once = replace(found, subject=replace(found.subject, in_order=False), cohorts=())
    drawn, read = Reader(html.render(found)), Reader(html.render(at_once))
    assert "Retention" in drawn.headings and "Retention" not in read.headings
    for at in (0, 1):  # of facts, and of metrics
        assert "right after" in drawn.tables[at][0] and "right after" not in read.tables[at][0], (
            "it is what stands there now"
        )
    since = replace(at_once, facts=(replace(found.facts[0], right_after="x"), *found.facts[1:]))
    assert "right after" in Reader(html.render(since)).tables[0][0]


def test_a_share_is_drawn_once_with_what_all_protocols_say() -> None:
    def of(protocol: str, name: str, value: float, **more: Any) -> Metric:
        return Metric(protocol, name, Measure(0.125, 0, 1, 4), None, Measure(value, 0.25, 1, 4), 4, **more)

    drawn = charts.shares(
        (
            of("qa", "reliability", 0.5), of("qa", "locality", 0.75), of("qa", "locality", 0.5, group="same_subject"),
            of("zsre", "reliability", 1.0), of("zsre", "portability", 1.0), of("memit", "reliability", 0.25),
        )
    )  # fmt: skip
    assert [(d.label, d.after.value, d.lowest, d.highest) for d in drawn] == [
        ("reliability", 0.5, 0.25, 1.0), ("locality", 0.75, 0.75, 0.75), ("locality · same subject", 0.5, 0.5, 0.5),
        ("portability (zsre)", 1.0, 1.0, 1.0),
    ]  # fmt: skip
    svg = charts.svg_shares(drawn)
    assert svg.count("<circle") == 4 and svg.count('class="band"') == 1 and "50.0% (25.0 – 100.0%)" in svg
    assert "by the protocol qa" in charts.shares_about(drawn) and "Bands" not in charts.shares_about(drawn[1:])


def test_pages_say_which_intervals_and_what_a_dash_is(full: Path) -> None:
    for text in (html.render(evaluation()), render(look_through(full))):
        told = " ".join(Reader(text).text.split())
        assert "percentile bootstrap over facts" in told and "Wilson's" in told
        assert "–: not asked, not recorded, or not to be known; of an interval: no value varied." in told


def test_sizes_of_a_column_have_one_unit() -> None:
    assert in_one_unit([12_400, 2_990]) == ("kB", ["12.4", "3.0"])
    assert in_one_unit([2_177_000, 12_400, 960_000]) == ("MB", ["2.2", "0.01", "1.0"])
    assert in_one_unit([3_500_000_000, 1_234_500_000_000]) == ("GB", ["3.5", "1,234.5"])
    assert in_one_unit([]) == ("kB", [])


def test_json_is_the_same_data(
    full: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", full, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir()), "no page unless it is asked for"
    assert run("inspect", full / "first.safetensors", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert {k: said["patches"][0][k] for k in alone} == alone
    assert said["evaluations"][0]["evaluation"] == jsonable(evaluation())
    assert [c["kind"] for c in said["conflicts"]] == ["fact", "order"] and said["patches"][0]["missed"][0][
        "prompt"
    ] == "A is"
    assert said["results"][1]["status"] == "failed" and len(said["left_out"]) == 4 and said["model"] is None
    assert run("report", full, "--json", "-o", "p.html") == 0 and Path("p.html").read_text().startswith(
        "<!doctype html>"
    )


def test_the_page_is_written_once_and_whole(
    full: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", full) == 0
    shown = capsys.readouterr()
    assert "2 patches with 32 facts: 26 held" in shown.out and "written: report.html" in shown.err
    assert "left out: short.safetensors: " in shown.err
    before = Path("report.html").read_bytes()
    assert run("report", full) == 7 and "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr("mosectl.report.pages.render", lambda found: 1 / 0)
    assert run("report", full, "--overwrite") == 1
    assert Path("report.html").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("report", full, "--overwrite") == 0
    capsys.readouterr()
    target = shutil.copytree(full, tmp_path / "own")
    for _ in range(2):
        assert run("report", target, "-o", target / "report.html", "--overwrite") == 0, "beside what it tells of"
    capsys.readouterr()
    assert run("report", target, "-o", target / "eval.json", "--overwrite") == 7
    assert "it would be lost" in capsys.readouterr().err and json.loads((target / "eval.json").read_text())


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({}, "holds nothing to report"),
        ({"notes.txt": b"x", "config.json": b"{}"}, "holds nothing to report"),
        ({"other.json": b"{}"}, "other.json: JSON, and not an evaluation"),
        (None, "no such folder"),
    ],
)
def test_nothing_to_report_is_one_clear_error(
    made: dict[str, bytes] | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    for name, content in (made or {}).items():
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    if made == {}:
        place.mkdir()
    assert run("report", place, "-o", tmp_path / "r.html") == 2
    err = capsys.readouterr().err
    assert told in " ".join(err.split()) and err.count("error") == 1 and "→" in err and "Traceback" not in err
    assert not (tmp_path / "r.html").exists()
    (tmp_path / "r.html").write_text("a page of before")
    assert run("report", place, "-o", tmp_path / "r.html") == 2, "not 7: there is nothing to write"
    assert told in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "r.html").read_text() == "a page of before"
    assert run("report", __file__) == 2 and "is a file, not a folder" in capsys.readouterr().err


def test_damaged_files_alone_make_a_page_that_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "run"
    place.mkdir()
    make().save(place / "whole.safetensors")
    data = (place / "whole.safetensors").read_bytes()
    (place / "whole.safetensors").unlink()
    (place / "cut.safetensors").write_bytes(data[:40])
    (place / "empty.safetensors").write_bytes(b"")
    (place / "turned.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if hasattr(os, "mkfifo"):  # where links and pipes can be made by anybody
        (place / "gone.safetensors").symlink_to(place / "nowhere")
        os.mkfifo(place / "pipe.json")
    document = json.dumps(jsonable(evaluation()), indent=2)
    (place / "cut.json").write_text(document[:500])
    (place / "typed.json").write_text(document.replace('"units": 12', '"units": "x"'))
    (place / "results.jsonl").mkdir()
    assert run("report", place, "-o", tmp_path / "r.html") == 0, capsys.readouterr().err
    rows = dict(Reader((tmp_path / "r.html").read_text()).table("file", "why"))
    assert rows.keys() == {p.name for p in place.iterdir()}
    assert "cut short" in rows["cut.safetensors"] and "cut short" in rows["empty.safetensors"]
    assert "no such file" in rows.get("gone.safetensors", "no such file")
    assert "is not a rotation" in rows["turned.safetensors"] and "damaged" in rows["cut.json"]
    assert "metrics[0].before.units: must be a whole number, found 'x'" in rows["typed.json"]
    assert "is a folder" in rows["results.jsonl"] and "pipe" in rows.get("pipe.json", "a pipe")
    assert str(tmp_path) not in (tmp_path / "r.html").read_text(), "no path of this machine"


def test_an_edited_model_tells_its_stack_in_order(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    patches = [replace(patch_for(model, seed=s), facts=(fact(s),)) for s in (1, 2, 3)]
    patches.sort(key=lambda p: p.id, reverse=True)  # so that the order is not that of the names
    apply(patches, model, tmp_path / "edited")
    found = look_through(tmp_path / "edited")
    assert [p.inspection.patch.id for p in found.patches] == [p.id for p in patches] and found.model
    assert summary(found).startswith("An edited model: ") and "3 patches applied, listed in their order." in summary(
        found
    )
    assert not found.left_out, "the model's own weights are no patch that is missing"
    patches[0].save(tmp_path / "edited" / "copy.safetensors")
    stored = tmp_path / "edited" / found.patches[1].file
    stored.write_bytes((tmp_path / "edited" / found.patches[2].file).read_bytes())
    spoilt = look_through(tmp_path / "edited")
    left = {f.file: f.why for f in spoilt.left_out}
    assert left["copy.safetensors"] == f"the same patch as {found.patches[0].file}"
    assert left[found.patches[1].file] == "not the patch that mosectl.json names"
    (tmp_path / "edited" / "mosectl.json").write_text("{")
    assert "damaged" in {f.file: f.why for f in look_through(tmp_path / "edited").left_out}["mosectl.json"]


def test_patches_for_models_of_different_sizes_have_no_conflicts(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    make(facts=(fact(0),)).save(place / "a.safetensors")
    patch_for(save(tmp_path / "model")).save(place / "b.safetensors")
    found = look_through(place)
    assert found.apart == 1 and not found.conflicts
    assert "1 pair of patches for models of different sizes" in Reader(render(found)).text


# Evaluations come back from their JSON.


def test_an_evaluation_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps(jsonable(evaluation())))
    assert read_evaluation(path) == evaluation()
    path.write_text(json.dumps([1]))
    assert read_evaluation(path) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"facts": [{}]}, "facts[0]: fields missing"),
        ({"seconds": True}, "seconds: must be a number, found true"),
        ({"more": 1}, "fields missing or unknown: more"),
        ({"settings": {}}, "settings: lacks protocols"),
        ({"settings": {"protocols": {"x": 1}, "resamples": 1, "seed": 0}}, "settings.protocols.x: must be a text"),
        (
            {"retention": [{"first": 0, "last": 0, "right_after": None, "after": 1.0}]},
            "retention: facts are not numbered",
        ),
    ],
)
def test_an_evaluation_that_is_not_as_it_is_written_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**jsonable(evaluation()), **change}))
    with pytest.raises(UsageError, match=re.escape(told)):
        read_evaluation(path)


def test_numbers_that_are_no_shares_are_drawn_all_the_same() -> None:
    m = replace(evaluation().metrics[0].after, value=1e300, low=float("nan"), high=-5.0)  # type: ignore[type-var]
    odd = replace(evaluation(), metrics=(replace(evaluation().metrics[0], after=m),))
    assert "inf" not in html.render(odd).split("<svg", 1)[1].split("</svg>")[0]
    assert typed(float, None) != typed(float, None), "null was not finite"
    with pytest.raises(Misfit, match="list"):
        typed(tuple[int, ...], "abc")


# What nobody's text can do.


def policy(text: str) -> str:
    return next(str(a["content"]) for t, a in Reader(text).tags if t == "meta" and a.get("http-equiv"))


def hashed(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_nothing_but_the_own_script_can_run(tmp_path: Path) -> None:
    for text in (render(look_through(folder(tmp_path / "run", EVIL))), html.render(evaluation(EVIL))):
        read = Reader(text)
        tags = [t for t, _ in read.tags]
        assert tags.count("script") == tags.count("style") == 1
        assert not {"img", "iframe", "object", "embed", "link", "base", "form", "input"} & {*tags}
        names = {name for _, attrs in read.tags for name in attrs}
        assert not [
            n for n in names if n.startswith("on") or n in ("src", "srcdoc", "style", "formaction", "xlink:href")
        ]
        links = [str(a["href"]) for t, a in read.tags if "href" in a]
        assert all(re.fullmatch(r"#s\d+", link) for link in links), "links stay within the page"
        (script,), (style,) = (re.findall(f"<{t}>(.*?)</{t}>", text, re.DOTALL) for t in ("script", "style"))
        ours = f"style-src {hashed(style)}; script-src {hashed(script)}"
        assert policy(text) == f"default-src 'none'; {ours}; base-uri 'none'; form-action 'none'"
        assert "window.x" not in script + style and "\u202e" not in text and r"\u202e" in read.text
        assert EVIL.split("\u202e")[0] in read.text and "{{7*7}}" in read.text, "foreign text is shown as it is"
        assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<script>")
        assert not re.search(r"https?:|//[a-z]|url\(|@import", style + script), "nothing is fetched"
        assert "innerHTML" not in script and "eval" not in script


def test_a_table_escapes_every_part_of_it() -> None:
    rows = [(EVIL, Mark(EVIL, False), EVIL, EVIL)]
    block = table((EVIL, f"!{EVIL}", f">{EVIL}", f"~{EVIL}"), rows, title=EVIL, about=EVIL, folded=EVIL, cards=True)
    whole = Page(EVIL, (EVIL,), (EVIL,), (Section(EVIL, (*block, Words(EVIL))),), True, EVIL)
    read = Reader(page.draw(whole))
    assert [t for t, _ in read.tags].count("script") == 1 and "img" not in [t for t, _ in read.tags]
    labels = [a["data-label"] for _, a in read.tags if "data-label" in a]
    assert len(labels) == 4 and all(str(label).startswith("</td>") for label in labels)


def test_columns_without_a_number_are_left_out() -> None:
    (found,) = table(("a", ">b", ">c"), [("x", "–", "1"), ("", "", "–")])
    assert [c.name for c in found.columns] == ["a", "c"] and found.rows == (("x", "1"), ("", "–"))
    assert table(("a",), []) == () and page.sections(None, Section("empty")) == ()


def test_the_templates_come_with_the_package() -> None:
    from importlib.resources import files

    assert {p.name for p in (files("mosectl.render") / "templates").iterdir()} == {
        "page.html.j2",
        "page.css",
        "sort.js",
    }


def test_a_cell_of_a_bench_that_is_old_has_a_row(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    old = {k: v for k, v in result().items() if k not in ("label", "dataset", "stopped", "cohorts")}
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(old) + "\n")
    read = Reader(render(look_through(tmp_path / "run")))
    assert read.headings[1:] == ["Bench"] and read.table("method", "status")[0][-1] == "done"
