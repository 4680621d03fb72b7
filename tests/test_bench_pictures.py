"""The frontier of a bench: where its dots and whiskers land, and when there is none. Curves: test_bench.py."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mosectl.bench.config import RunKind
from mosectl.bench.pictures import COLOURS, DASHES, svg_abilities, svg_frontier
from mosectl.bench.report import write_report
from mosectl.errors import OutputError

SVG = "{http://www.w3.org/2000/svg}"
FIRST, SECOND = COLOURS[:2]
KNOWN, PLAIN = "generalization over known wordings (QA), %", "generalization, %"

Place = tuple[float, float]


def share(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "units": 2}


def record(label: str, known: Any, same: Any, near: Any = None, **changes: Any) -> dict[str, Any]:
    """A cell as results.jsonl has it; its plain generalization is .99, which no test takes for another number."""
    groups = {name: m for name, m in (("neighborhood", near), ("same_subject", same), ("other", share(0.5))) if m}
    sides = {k: {"before": None, "after": None} for k in ("text_loss", "perplexity")}
    return {
        "status": "done", "reason": "", "stopped": "", "label": label, "model": "m", "dataset": "d", "edits": 2,
        "batch_size": 1, "seed": 0, "known": known, "groups": groups, "scores": {"generalization": share(0.99)},
        "harmonic": 0.5, "drift": {}, "seconds": {}, **sides, **changes,
    }  # fmt: skip


class Picture:
    """A frontier read back by its ticks: places in percent."""

    def __init__(self, *records: dict[str, Any]) -> None:
        text = svg_frontier(records)
        assert text is not None
        self.root = ET.fromstring(text)
        labels = list(self.root.iter(f"{SVG}text"))
        self.texts = [t.text or "" for t in labels]
        ticks = [t for t in labels if (t.text or "").isdecimal()]
        across = [(int(t.text or ""), float(t.attrib["x"])) for t in ticks if t.attrib["text-anchor"] == "middle"]
        up = [(int(t.text or ""), float(t.attrib["y"]) - 4) for t in ticks if t.attrib["text-anchor"] == "end"]
        self.panels = [(dict(across[i : i + 5]), dict(up[i : i + 5])) for i in range(0, len(ticks) // 2, 5)]
        for xs, ys in self.panels:
            assert list(xs) == list(ys) == [0, 25, 50, 75, 100]
            assert xs[0] < xs[25] < xs[50] < xs[75] < xs[100] and ys[0] > ys[25] > ys[50] > ys[75] > ys[100]
            assert xs[25] - xs[0] == pytest.approx(xs[100] - xs[75]) and ys[25] - ys[0] == pytest.approx(
                ys[100] - ys[75]
            )
        self.circles = [c for c in self.root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]  # no legend's
        self.titles = [str(c[0].text) for c in self.circles]

    def place(self, x: float, y: float, panel: int) -> Place | None:
        """To half a percent, as the file has tenths of a unit; None: in another panel, or in none."""
        xs, ys = self.panels[panel]
        at = 100 * (x - xs[0]) / (xs[100] - xs[0]), 100 * (y - ys[0]) / (ys[100] - ys[0])
        return (round(2 * at[0]) / 2, round(2 * at[1]) / 2) if all(-0.2 < v < 100.2 for v in at) else None

    def dots(self, panel: int) -> dict[str, Place]:
        """By the method's colour."""
        found = [(c.attrib["stroke"], float(c.attrib["cx"]), float(c.attrib["cy"])) for c in self.circles]
        return {colour: at for colour, x, y in found if (at := self.place(x, y, panel))}

    def whiskers(self, panel: int, colour: str) -> list[list[Place]]:
        """That along x first."""
        out = []
        for line in self.root.iter(f"{SVG}polyline"):
            ends = [self.place(*map(float, p.split(",")), panel) for p in line.attrib["points"].split()]  # type: ignore[misc]
            if line.attrib["stroke"] == colour and None not in ends:
                out.append(ends)
        return sorted(out, key=lambda ends: ends[0][0] == ends[1][0])


def test_dots_and_whiskers_land_where_the_record_says() -> None:
    drawn = Picture(
        record("a", share(0.5, 0.2, 0.7), share(0.8, 0.6, 0.9), share(0.25, 0.1, 0.3)),
        record("b", share(1.0, 0.4, 1.0), share(0.0, 0.0, 0.5), share(0.75)),
    )
    assert len(drawn.panels) == 2
    assert drawn.dots(0) == {FIRST: (50, 80), SECOND: (100, 0)}
    assert drawn.dots(1) == {FIRST: (50, 25), SECOND: (100, 75)}
    assert drawn.whiskers(0, FIRST) == [[(20, 80), (70, 80)], [(50, 60), (50, 90)]]
    assert drawn.whiskers(0, SECOND) == [[(40, 0), (100, 0)], [(100, 0), (100, 50)]]
    assert drawn.whiskers(1, FIRST) == [[(20, 25), (70, 25)], [(50, 10), (50, 30)]]
    assert drawn.whiskers(1, SECOND) == [[(40, 75), (100, 75)], [(100, 75), (100, 75)]], "no interval, no length"
    kept = [drawn.texts.index(f"{group} kept (QA), %") for group in ("same subject", "neighbours")]
    assert kept == sorted(kept) and drawn.texts.count(KNOWN) == 2
    assert {"m · d · 2 edits, one by one", "a", "b"} <= {*drawn.texts}
    assert {*drawn.titles} == {"a: 50.0, 80.0", "b: 100.0, 0.0", "a: 50.0, 25.0", "b: 100.0, 75.0"}


def test_seeds_are_averaged_as_in_the_tables() -> None:
    three = [record("a", share(k, 0, 1), share(s, 0, 1)) for k, s in ((0.1, 0.9), (0.2, 1.0), (0.3, 0.8))]
    drawn = Picture(*three, {**three[0], "status": "failed"})
    assert drawn.titles == ["a: 20.0, 90.0"] and drawn.dots(0) == {FIRST: (20, 90)}
    # Student's t: 4.30 · .1 / √3 = .248; whiskers end where shares do
    assert drawn.whiskers(0, FIRST) == [[(0, 90), (45, 90)], [(20, 65), (20, 100)]]


def test_one_axis_means_one_thing() -> None:
    """A method is not set beside others by another generalization than theirs."""
    half = share(0.5)
    for missing in (None, share(None)):
        drawn = Picture(record("a", half, half), record("b", missing, share(0.25)))
        assert drawn.texts.count(PLAIN) == 2 and KNOWN not in drawn.texts
        assert drawn.dots(0) == {FIRST: (99, 50), SECOND: (99, 25)}
    older = {k: v for k, v in record("b", None, None).items() if k not in ("groups", "known")}
    drawn = Picture(record("a", half, half), older, record("c", None, half, dataset="e"))
    assert drawn.texts.count(KNOWN) == drawn.texts.count(PLAIN) == 2, "older records and other rows do not count"
    assert drawn.dots(0) == {FIRST: (50, 50)} and drawn.dots(2) == {COLOURS[2]: (99, 50)}


def test_a_row_for_each_model_dataset_and_run_and_the_colours_of_the_other_pictures() -> None:
    half, curve = share(0.5), [{"edits": i, "loss": 3.0 + i, "norm": {}, "condition": {}} for i in range(2)]
    records = [
        record("plain", half, None, curve=curve), record("a", half, share(0.25)),
        record("a", share(0.25), half, edits=4, curve=curve), record("b", half, share(0.75), edits=4, curve=curve),
        record("a", half, half, model="n"), record("a", half, half, batch_size=0),
    ]  # fmt: skip
    drawn = Picture(*records)
    assert len(drawn.panels) == 8 and drawn.texts.count("not asked") == 4, "nobody asked for neighbours"
    assert [drawn.dots(i) for i in (0, 1)] == [{SECOND: (50, 25)}, {}]
    assert drawn.dots(2) == {SECOND: (25, 50), COLOURS[2]: (50, 75)}
    assert [t for t in drawn.texts if " · " in t] == [
        "m · d · 2 edits, one by one", "m · d · 4 edits, one by one", "n · d · 2 edits, one by one",
        "m · d · 2 edits in one batch",
    ]  # fmt: skip
    curves = [line.attrib["stroke"] for line in ET.fromstring(svg_abilities(records)).iter(f"{SVG}polyline")]
    assert curves[-3:] == list(COLOURS[:3]) and drawn.texts[-3:] == ["plain", "a", "b"], "the legend is the same"


def test_many_methods_in_one_place_are_all_to_be_seen() -> None:
    half = share(0.5)
    drawn = Picture(*(record(str(i) + "x", half, half) for i in range(12)))
    assert drawn.titles == [f"{i}x: 50.0, 50.0" for i in reversed(range(12))], "the first on top"
    radii = [float(c.attrib["r"]) for c in drawn.circles]
    assert radii == sorted(radii, reverse=True) and len({*radii}) == 12, "rings around each other"
    shared = {c.attrib["stroke"]: [] for c in drawn.circles}
    for c in drawn.circles:
        shared[c.attrib["stroke"]].append((c.attrib["fill"], c.attrib.get("stroke-dasharray", "")))
    assert shared[FIRST] == [("#fff", DASHES[1]), (FIRST, "")], "a colour that comes again"
    height = float(drawn.root.attrib["viewBox"].split()[-1])
    assert all(float(t.attrib["y"]) < height for t in drawn.root.iter(f"{SVG}text"))


def test_foreign_text_is_no_markup() -> None:
    half, text = share(0.5), "<b>&\"'\x1b"
    drawn = Picture(record(text, half, half, model=text, dataset=text))
    fit = text.replace("\x1b", "\\x1b")
    assert drawn.texts[0] == f"{fit} · {fit} · 2 edits, one by one" and drawn.texts[-1] == fit
    assert drawn.titles == [f"{fit}: 50.0, 50.0"] and not list(drawn.root.iter(f"{SVG}b"))


@pytest.mark.parametrize(
    "found",
    [
        {},
        record("a", share(0.5), None),
        record("a", share(0.5), share(None)),
        record("a", None, share(0.5), scores={}),
        {**record("a", share(0.5), share(0.5)), "status": "failed"},
        {k: v for k, v in record("a", None, None).items() if k not in ("groups", "known")},
    ],
)
def test_no_groups_no_file(found: dict[str, Any], tmp_path: Path) -> None:
    bench: Any = SimpleNamespace(name="b", seeds=(0,), notes=())
    cell: Any = SimpleNamespace(key="k", label="a", model="m", dataset=SimpleNamespace(name="d"), run=RunKind(2, 1))
    whole = {"k": record("a", share(0.5), share(0.5))}
    plain = ["tables.md", "norms.svg", "abilities.svg"]

    def written(results: dict[str, Any]) -> list[str]:
        return [path.name for path in write_report(bench, [cell], results, tmp_path)]

    assert svg_frontier([found] if found else []) is None
    assert written({"k": found} if found else {}) == plain and {p.name for p in tmp_path.iterdir()} == {*plain}
    assert "frontier" not in (tmp_path / "tables.md").read_text()
    assert written(whole) == [*plain, "frontier.svg"]
    assert (tmp_path / "frontier.svg").read_text() == svg_frontier(list(whole.values()))
    assert (tmp_path / "tables.md").read_text().endswith("![abilities](abilities.svg)\n\n![frontier](frontier.svg)\n")
    assert written({}) == plain and not (tmp_path / "frontier.svg").exists(), "one of other results does not stay"
    (tmp_path / "frontier.svg").mkdir()
    with pytest.raises(OutputError):
        written({})
