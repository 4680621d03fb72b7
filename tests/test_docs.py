"""The documentation: generated pages are current, links lead somewhere, commands in it exist. Needs no MkDocs."""

from __future__ import annotations

import importlib.util
import re
import sys
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

import mosectl
from mosectl.cli import app as cli
from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CHECKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *PAGES]
YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / "mkdocs.yml", ROOT / "CITATION.cff"])
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.M)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path, code: bool = False) -> str:
    """A page with its snippets in it; without blocks of code (or only these), and without code spans."""
    text = SNIPPET.sub(lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), path.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line for line in text.splitlines() if line.startswith("    ") is code]
    return "\n".join(lines) if code else re.sub(r"`[^`\n]*`", "", "\n".join(lines))


@cache
def anchors(path: Path) -> tuple[set[str], set[str]]:
    """What the headings of a page are called in the built site, and on GitHub."""
    text = SNIPPET.sub(lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), path.read_text(encoding="utf-8"))
    titles = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t).replace("`", "") for t in re.findall(r"^#{1,6} (.+)$", text, re.M)
    ]
    ascii_only = [unicodedata.normalize("NFKD", t).encode("ascii", "ignore").decode() for t in titles]
    site = [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in ascii_only]
    github = [re.sub(r"[^\w\s-]", "", t).strip().lower().replace(" ", "-") for t in titles]
    return numbered(site, "_"), numbered(github, "-")


def numbered(slugs: list[str], joint: str) -> set[str]:
    """Headings of one name are told apart by a number behind it."""
    seen: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(slug + (f"{joint}{seen[slug]}" if seen[slug] else ""))
        seen[slug] += 1
    return found


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # which changes nothing
    assert generator().main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = generator()
    monkeypatch.setattr(generate, "REFERENCE", tmp_path)
    assert generate.main(["--check"]) == 1 and not any(tmp_path.iterdir())
    assert generate.main([]) == 0 == generate.main(["--check"])
    (tmp_path / "settings.md").write_text("old")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert "docs/reference/settings.md" in err and "commands.md" not in err


@pytest.mark.parametrize("page", CHECKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif DOCS in page.parents and DOCS not in path.parents:
            wrong.append(f"{target}: is not part of the site")
        elif anchor and not (path.suffix == ".md" and all(anchor in a for a in anchors(path))):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for p in (part.values() if isinstance(part, dict) else part) for page in pages(p)]

    found = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(found) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


@pytest.mark.parametrize("page", CHECKED, ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    root: Any = typer.main.get_command(cli.app)
    wrong = []
    for line in re.sub(r"\\\n\s*", "", prose(page, code=True)).splitlines():
        for command, rest in re.findall(r"\bmosectl ([a-z][a-z-]*)( [^#|]*|$)", line.partition(" #")[0]):
            if command not in root.commands:
                wrong.append(f"mosectl {command}")
                continue
            known = {o for p in root.commands[command].params for o in (*p.opts, *p.secondary_opts)}
            used = re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)
            wrong += [f"mosectl {command} {o}" for o in used if o not in known | {"--help"}]
    assert wrong == []


def test_the_public_names_are_documented() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    assert [n for n in mosectl.__all__ if f"mosectl.{n}" not in text] == []


def test_every_place_that_the_architecture_page_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    places = [p.rstrip("/") for p in re.findall(r"`([a-z_]+(?:/[\w.*]+)*(?:\.py|\.md|/))`", text)]
    lost = [p for p in places if not [*ROOT.glob(p), *(ROOT / "mosectl").glob(p)]]
    assert len(places) > 30 and lost == []


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert any("make demo" in line for line in lines[:10]) and any("make test" in line for line in lines[:10])


@pytest.mark.parametrize("file", YAML, ids=name)
def test_yaml_can_be_read(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("file", WORKFLOWS, ids=name)
def test_workflows_are_careful(file: Path) -> None:
    """Least permissions, one run at a time, actions of a stated major version, no secret, no text of others in a shell."""
    text = file.read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    assert flow["permissions"] in ({}, {"contents": "read"}) and "group" in flow["concurrency"]
    assert "secrets." not in text and "pull_request_target" not in text
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert re.search(r"@(release/)?v\d+$", step.get("uses", "@v1"))
            assert "${{ github" not in step.get("run", "")
