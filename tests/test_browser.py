"""The pages in headless Chromium: light, dark and 400 pixels wide; sorted; with text that wants to run script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mosectl.render import html
from mosectl.render.page import Page, Section, draw, table
from mosectl.report.folder import look_through
from mosectl.report.pages import render
from support.browser import started
from support.golden import FOLDER, WRITE
from support.reports import evaluation, folder

LOOKS = {
    "light": (1200, "light"), "dark": (1200, "dark"), "narrow": (400, "light"), "narrow dark": (400, "dark"),
    "narrow half": (500, "light"), "tablet": (800, "light"),
}  # fmt: skip
# Texts as strangers may write them into facts, paths and names of models; each tries to set window.x.
HOSTILE = {
    "script": "<script>window.x=1</script>",
    "image": "\"'><img src=x onerror=window.x=1>",
    "link": "javascript:window.x=1",
    "style": "</style></title></textarea><svg onload=window.x=1><style>*{display:none}",
    "template": "{{ self.__init__ }}{% raw %}${window.x=1}<!--",
    "turned": "\u202egnp.exe \u2066\x1b[31m\x00",
    "long": "W" * 3000,
    "entity": "&lt;script&gt;&#x3c;script>window.x=1//<a href=javascript:window.x=1>a</a>",
}

# Lines on which each word of a text stands: a word on two of them is broken.
BROKEN = """
(nodes) => {
  const out = [];
  for (const node of nodes) {
    const walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    for (let text; (text = walk.nextNode()); ) {
      for (const word of text.data.matchAll(/[^\\s]+/g)) {
        const range = document.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) out.push(word[0]);
      }
    }
  }
  return out;
}
"""
# Of every text that is shown, the contrast to what it stands on (WCAG 2).
CONTRAST = """
() => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = numbers(c).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = getComputedStyle(node).backgroundColor;
      if (numbers(c)[3] !== 0) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walk.nextNode()); ) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), drawn = node.namespaceURI.endsWith("svg");
    const pair = [light(drawn ? style.fill : style.color), light(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const key = node.tagName.toLowerCase() + "." + (node.getAttribute("class") ?? "");
    found[key] = Math.min(found[key] ?? 99, ratio);
  }
  return found;
}
"""
# Where the parts of the page stand, in words rather than pixels.
LAYOUT = """
() => [...document.querySelectorAll("section")].map((section) => {
  const box = section.getBoundingClientRect();
  const own = (selector) => [...section.querySelectorAll(":scope > " + selector)];
  return {
    heading: section.querySelector("h2, h3").textContent.replace(/[0-9a-f]{12}/, "<id>"),
    inside: box.left >= 0 && box.right <= innerWidth,
    blocks: own("*").slice(1).filter((n) => n.tagName !== "SECTION").map((n) => n.tagName.toLowerCase()),
    tables: [...own(".wide"), ...own("details > .wide")].filter((n) => n.querySelector("table")).map((n) => ({
      columns: [...n.querySelectorAll("th")].map((h) => h.textContent.trim()),
      rows: n.querySelectorAll("tbody tr").length,
      "as cards": getComputedStyle(n.querySelector("td")).display !== "table-cell",
      "scrolls in its box": getComputedStyle(n).overflowX === "auto",
      "wider than the page": n.getBoundingClientRect().right > innerWidth,
    })),
  };
})
"""


@dataclass
class Shown:
    """A page in a browser, and what it has complained of or tried to fetch."""

    page: Any
    errors: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)


class Show:
    """Opens pages as files, as they are when somebody has sent them."""

    def __init__(self, browser: Any, place: Path) -> None:
        self.browser, self.place, self.opened = browser, place, 0

    def __call__(self, text: str, look: str = "light", **how: Any) -> Shown:
        width, scheme = LOOKS[look]
        size = {"width": width, "height": 900}
        page = self.browser.new_context(viewport=size, color_scheme=scheme, **how).new_page()
        found = Shown(page)
        page.on("console", lambda m: found.errors.append(m.text))
        page.on("pageerror", lambda e: found.errors.append(str(e)))
        page.on("dialog", lambda d: found.errors.append(d.message))
        page.on("request", lambda r: found.fetched.append(r.url))
        self.opened += 1
        file = self.place / f"{self.opened}.html"
        file.write_text(text, encoding="utf-8")
        page.goto(file.as_uri())
        return found


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    with started() as browser:
        yield Show(browser, tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "report": render(look_through(folder(tmp_path_factory.mktemp("r") / "run"))),
        "eval": html.render(evaluation()),
    }


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", ["report", "eval"])
def test_a_page_is_whole_and_readable(kind: str, look: str, show: Show, pages: dict[str, str]) -> None:
    found = show(pages[kind], look)
    page = found.page
    page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    sizes = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert max(sizes[:2]) <= sizes[2], "the page never scrolls sideways"
    words = "th, .mark, .word, h1, h2, h3, td.number, summary, .caption"
    assert page.eval_on_selector_all(words, BROKEN) == []
    assert page.eval_on_selector_all("td:not(.long), p, li", BROKEN) == [], "nor are the words of facts"
    worst = {name: ratio for name, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5}
    assert not worst, f"{look}: too little contrast"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (not look.endswith("dark"))
    right = "all => all.every((n) => getComputedStyle(n).textAlign === 'right')"
    assert look.startswith("narrow") or page.eval_on_selector_all(".number", right)
    assert "tabular-nums" in page.eval_on_selector("td.number", "n => getComputedStyle(n).fontVariantNumeric")
    assert not found.errors and len(found.fetched) == 1, "it complains of nothing and fetches nothing"


@pytest.mark.parametrize(("look", "most"), [("narrow half", 240), ("tablet", 100), ("light", 100)])
@pytest.mark.parametrize("kind", ["report", "eval"])
def test_no_row_is_tall(kind: str, look: str, most: int, show: Show, pages: dict[str, str]) -> None:
    page = show(pages[kind], look).page
    page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    heights = "all => all.map((r) => [Math.round(r.getBoundingClientRect().height), r.textContent.slice(0, 60)])"
    tall = [row for row in page.eval_on_selector_all("tbody tr", heights) if row[0] > most]
    assert not tall, f"pixels of rows that are at most {most} tall: {tall[:5]}"


@pytest.mark.parametrize("look", ["light", "narrow"])
@pytest.mark.parametrize("kind", ["report", "eval"])
def test_the_layout_is_as_it_was(kind: str, look: str, show: Show, pages: dict[str, str]) -> None:
    page = show(pages[kind], look).page
    page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    layout = page.evaluate(LAYOUT)
    assert all(part["inside"] and not any(t["wider than the page"] for t in part["tables"]) for part in layout)
    wide = page.eval_on_selector_all(".wide", "all => all.filter((n) => n.scrollWidth > n.clientWidth).length")
    assert wide or look != "narrow", "what is wider than a phone does scroll"
    path = FOLDER / f"layout-{kind}-{look}.json"
    if WRITE:
        path.write_text(json.dumps(layout, indent=1, ensure_ascii=False) + "\n")
    assert layout == json.loads(path.read_text()), "MOSECTL_GOLDENS=write shows the change in git"


def column(page: Any, heading: str, number: int) -> list[str]:
    """The cells of a column of the first table below a heading."""
    return page.evaluate(
        """([heading, number]) => {
          const all = [...document.querySelectorAll("section")];
          const section = all.find((s) => s.querySelector("h2, h3").textContent === heading);
          return [...section.querySelector("tbody").rows].map((row) => row.cells[number].textContent.trim());
        }""",
        [heading, number],
    )


def test_tables_are_sorted_by_any_column_and_go_back(show: Show, pages: dict[str, str]) -> None:
    page = show(pages["eval"]).page
    first, chances = column(page, "Facts", 0), column(page, "Facts", 6)
    section = page.locator("section", has=page.get_by_role("heading", name="Facts", exact=True)).first
    head = section.locator("th", has_text="P(new) after")
    head.locator("button").click()
    assert (
        column(page, "Facts", 6) == sorted(chances, key=float) != chances
        and head.get_attribute("aria-sort") == "ascending"
    )
    head.locator("button").press("Enter")
    assert column(page, "Facts", 6) == sorted(chances, key=float, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert column(page, "Facts", 0) == first and head.get_attribute("aria-sort") is None, "as it was"
    section.locator("th", has_text="prompt").locator("button").click()
    natural = [f"The capital of land {i} is" for i in range(12)]
    assert column(page, "Facts", 0) == natural, "numbers within texts count as numbers: 2 before 10"
    section.locator("th", has_text="verdict").locator("button").click()
    assert column(page, "Facts", 7)[0] == "does not hold" and page.locator("th[aria-sort]").count() == 1


def test_dashes_are_sorted_last_both_ways(show: Show) -> None:
    rows = [("a", "–"), ("b", "12,000 – 3"), ("c", "-1e-05"), ("d", ""), ("e", "0.004")]
    page = show(draw(Page("p", sections=(Section("Some", table(("name", ">number"), rows)),)))).page
    button = page.locator("th", has_text="number").locator("button")
    button.click()
    assert column(page, "Some", 0) == ["c", "e", "b", "a", "d"]
    button.click()
    assert column(page, "Some", 0) == ["b", "e", "c", "a", "d"]


def test_a_page_without_script_reads_as_well(show: Show, pages: dict[str, str]) -> None:
    found = show(pages["report"], java_script_enabled=False)
    assert "Where the order matters" in found.page.inner_text("body") and found.page.locator("button").count() == 0
    assert "held right after" in found.page.inner_text("thead >> nth=0")


@pytest.mark.parametrize("look", ["light", "narrow"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_runs_or_breaks_the_page(kind: str, look: str, show: Show, tmp_path: Path) -> None:
    word = HOSTILE[kind]
    for text in (render(look_through(folder(tmp_path / "run", word))), html.render(evaluation(word))):
        found = show(text, look)
        page = found.page
        page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
        for button in page.locator("th button").all()[:12]:
            button.evaluate("b => b.click()")
        page.wait_for_timeout(50)
        assert page.evaluate("typeof window.x") == "undefined" and not found.errors
        assert [u for u in found.fetched if not u.startswith("file:")] == [] and len(found.fetched) == 1
        assert page.locator("script").count() == page.locator("style").count() == 1 and page.locator("img").count() == 0
        assert page.locator("svg").count() == page.locator(".drawn > svg").count()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page never scrolls sideways"
        shown = page.evaluate("document.body.textContent")
        if kind == "turned":
            assert "\u202e" not in shown and r"\u202egnp.exe \u2066\x1b[31m\x00" in shown
        else:
            assert word in shown and page.locator("h2").first.is_visible()


def test_what_gets_past_the_escaping_does_not_run_either(show: Show, pages: dict[str, str]) -> None:
    """The policy alone: markup of a stranger's in the page, as a mistake of ours could let it in."""
    bad = (
        "<script>window.x=1</script><img src=x onerror='window.x=2'><svg onload='window.x=3'></svg>"
        "<a id=go href='javascript:window.x=4'>go</a><iframe srcdoc='<script>parent.x=5</script>'></iframe>"
        "<p id=styled style='color: red'>red</p><style>#styled { color: red }</style>"
    )
    found = show(pages["eval"].replace("<h1>", f"{bad}<h1>", 1))
    found.page.locator("#go").click()
    found.page.wait_for_timeout(200)
    assert found.page.evaluate("typeof window.x") == "undefined"
    assert found.page.eval_on_selector("#styled", "n => getComputedStyle(n).color") != "rgb(255, 0, 0)"
    assert any("Content Security Policy" in e for e in found.errors) and found.page.locator("th button").count() > 5
