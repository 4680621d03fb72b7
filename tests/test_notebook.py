"""What Jupyter shows of results, and the example notebook, run in a kernel of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mosectl
from mosectl.measure.before_after import Subject
from mosectl.measure.bootstrap import Measure
from mosectl.measure.evaluate import Bin, EvaluatedFact, Evaluation, TextMetric
from mosectl.measure.metrics import Metric
from mosectl.patch.record import PatchFact
from mosectl.render import console
from support.facts import FACTS, FEW
from support.models import make_tokenizer, pico
from support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
EVIL = "x</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e \" onload='alert(3)' $\\href{x}{y}$"
TAGS = {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "ul", "li"}


class Page(HTMLParser):
    """Fails where HTML holds more than tables and text, or where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows, self.text = 0, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS and {name for name, _ in attributes} <= {"class", "style", "open"}, (tag, attributes)
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert data.replace("\n", "").isprintable()
        self.text += data


def page(result: Any) -> Page:
    shown = result._repr_html_()
    assert shown.startswith('<div class="tex2jax_ignore mathjax_ignore">'), "nothing is typeset as mathematics"
    assert "color" not in shown, "the colours are the notebook's own, light or dark"
    return Page(shown)


@pytest.fixture(scope="module")
def result() -> mosectl.EditResult:
    return mosectl.edit(FACTS, pico("llama"), make_tokenizer(), options=FEW)


def evaluation(text: str, facts: int = 1) -> Evaluation:
    fact = EvaluatedFact(text, text, text, text, None, text, None, 0.5, False, None, {"generation.reliability": 0.5})
    settings = {"protocols": {"generation": text, "qa": text}, "text": text, "resamples": 1, "seed": 0}
    metrics = (Metric("generation", "reliability", None, None, Measure(0.5, 0.4, 0.6, 3), 3),)
    metrics += (Metric("generation", "locality", None, None, Measure(0.25, 0.2, 0.3, 3), 3, text),)
    subject = Subject("model", text, text, (), (), (), False)
    texts, bins = (TextMetric("perplexity", text, None, None),), (Bin(1, 1, None, 1.0),)
    return Evaluation(subject, metrics, texts, (), bins, (fact,) * facts, (text,), settings, 1.0)


def test_a_fact_cannot_run_a_script(result: mosectl.EditResult) -> None:
    fact = result.facts[0]
    facts = (replace(fact, fact=replace(fact.fact, prompt=EVIL), before=EVIL, after=EVIL),)
    probes = tuple(
        replace(p, prompt=EVIL, group=EVIL, before=EVIL, after=EVIL, change="changed") for p in result.probes
    )
    shares = tuple(replace(s, group=EVIL) for s in result.shares)
    patch = replace(
        result.patch, facts=(PatchFact(EVIL, "x", EVIL, EVIL, EVIL, 0.25, 0.75, EVIL),), model=EVIL, revision=EVIL,
        method=EVIL, options={**result.patch.options, "facts": [EVIL]}, parents=(EVIL,),
    )  # fmt: skip
    evil = replace(result, facts=facts, probes=probes, shares=shares, patch=patch, stopped=EVIL)
    for shown in (page(evil), page(patch), page(evaluation(EVIL))):
        assert "<script>alert(1)</script>" in shown.text and r"\x1b[2J\u202e" in shown.text, (
            "shown as it is, and as text"
        )


def test_what_is_shown(result: mosectl.EditResult) -> None:
    shown = page(result).text
    for text in ("of 2 facts reached", result.patch.id[:12], "I met Tomas Veldrin", "changed", "generalization"):
        assert text in shown
    assert "What else changed" in shown and "largest drift of a singular value" in shown
    told = page(result.patch).text
    assert "We went to Avaland" in told and "facts from" not in told and "2 mlp.down_proj" in told
    assert (
        "facts from"
        in page(replace(result.patch, options={**result.patch.options, "facts": ["hf://datasets/a/b"]})).text
    )
    measured = page(evaluation("a text")).text
    assert (
        "0 of 1 fact hold" in measured and "50.0%" in measured and "40.0% – 60.0%" in measured and "1 note" in measured
    )


def test_tables_are_small(result: mosectl.EditResult) -> None:
    many = replace(result, facts=result.facts * 500, patch=replace(result.patch, facts=result.patch.facts * 500))
    for found, more in (
        (many, "980 more: .facts"),
        (many.patch, "980 more: .facts"),
        (evaluation("x", 1000), "990 more"),
    ):
        shown = page(found)
        assert more in shown.text and shown.rows < 60
    long = replace(result.patch, facts=(replace(result.patch.facts[0], prompt="x" * 10_000),))
    assert len(long._repr_html_()) < 5_000 and len(repr(many)) < 10_000, "and so is what a console shows"


def test_bars_are_drawn_in_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    monkeypatch.setattr(console, "_cell", lambda: console.Console(force_jupyter=False, force_terminal=False))
    monkeypatch.setattr(console.Bars, "refresh", lambda bars: drawn.append(len(bars.tasks)))
    with pytest.raises(KeyError), mosectl.progress() as on_step:
        for done in range(100):
            on_step("targets", done, 100)
        raise KeyError
    assert 2 <= len(drawn) < 20 and drawn[-1] == 1, "not at every step, and once at the end"


def test_lines_without_the_library_for_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    with mosectl.progress() as on_step:
        on_step("targets", 0, 2)
    assert capsys.readouterr().err == "targets …\n"


def test_the_example_is_stored_without_results() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_example_runs() -> None:
    why = "a notebook is run by nbclient and ipykernel: pip install 'mosectl[dev]'"
    client = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    import nbformat

    found = nbformat.read(NOTEBOOK, 4)
    client.NotebookClient(found, timeout=250, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
    pages = [
        Page(o.data["text/html"]).text for o in outputs if o.output_type == "execute_result" and "text/html" in o.data
    ]
    assert len(pages) == 3 and "2 of 2 facts reached" in pages[0] and "2 of 2 facts hold" in pages[2]
    assert not [o for o in outputs if o.get("name") == "stderr"] or not has_widgets(), "no lines where there are bars"
    if has_widgets():
        assert "targets" in json.dumps(found.metadata["widgets"]), "the bars"
    assert not list(Path(NOTEBOOK.parent).glob("*.safetensors")), "and nothing is left beside it"


def has_widgets() -> bool:
    return console.find_spec("ipywidgets") is not None
