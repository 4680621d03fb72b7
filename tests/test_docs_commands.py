"""Every command of README, docs and examples is run for real on the demo model; every Python snippet too."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import mosectl
from mosectl.cli import app as cli
from mosectl.model.loading import load
from support import doc_commands as docs
from support.commands import run
from support.hub_server import TOKEN, call, serving
from support.models import save
from support.patches import patch_for
from support.paths import DEMO, ROOT

ALL = [command for page in docs.pages() for command in docs.commands(page)]
MISSING = {library for library in docs.NEEDS.values() if find_spec(library) is None}


def told_again(page: Path) -> bool:
    """An explanation whose commands a how-to has word for word: they are run there."""
    texts = {c.text for other in docs.pages() if other.parent.name == "how-to" for c in docs.commands(other)}
    return page.parent.name == "explanation" and {c.text for c in docs.commands(page)} <= texts


PAGES = [page for page in docs.pages() if docs.commands(page) and not told_again(page)]
OF_THE_HUB = [
    p for p in PAGES if any(docs.SCHEME in c.text or c.text.startswith("mosectl push") for c in docs.commands(p))
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patches of the demo model, and a model with the first: what most pages begin with."""
    folder = tmp_path_factory.mktemp("made")
    facts = docs.FACTS.read_text(encoding="utf-8").splitlines(keepends=True)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MOSECTL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for which, lines in (("a", facts[:2]), ("b", facts[2:4])):
            (folder / f"{which}.jsonl").write_text("".join(lines), encoding="utf-8")
            out = folder / f"{which}.safetensors"
            how = ("--corpus", docs.CORPUS, "--form", "compact", "--set", "wordings=0")
            assert run("edit", folder / f"{which}.jsonl", "--model", DEMO, "-o", out, *how) == 0
        assert run("apply", folder / "a.safetensors", "--model", DEMO, "-o", folder / "edited") == 0
    if "gguf" not in MISSING:
        from support.gguf_files import write_model

        demo = load(DEMO, device="cpu", dtype="float32")
        write_model(folder / "model.gguf", demo.model, demo.tokenizer, "llama")
    return folder


@pytest.mark.parametrize("command", ALL, ids=lambda c: f"{c.page}:{c.text[:60]}")
def test_it_parses(command: docs.Command) -> None:
    root: Any = typer.main.get_command(cli.app)
    which, *given = docs.arguments(command)
    root.commands[which].make_context(which, given)  # its options exist, and take such values


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [p for p in PAGES if p not in OF_THE_HUB], ids=docs.name)
def test_the_page_runs(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs.prepare(tmp_path, made)
    monkeypatch.chdir(tmp_path)
    wrong = docs.run_page(page, MISSING)
    assert not wrong, "\n".join([*wrong, capsys.readouterr().err])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", OF_THE_HUB, ids=docs.name)
def test_the_page_runs_with_a_hub(page: Path, made: Path, tmp_path: Path) -> None:
    docs.prepare(tmp_path / "here", made)
    with serving() as (hub, address):
        for repo, files in docs.data_sets().items():
            hub.repos[repo] = {}
            hub.commit(repo, files)
            hub.repos[repo]["v1.0"] = hub.repos[repo]["main"]
        code = f"from support.doc_commands import main; main({docs.name(page)!r}, {' '.join(MISSING)!r})"
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        done = call(address, tmp_path / "here", token=TOKEN, code=code, timeout=800, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_what_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a section a command may not write what one before it has written; a later section may."""
    page = tmp_path / "page.md"
    facts = f"mosectl check {docs.FACTS} --limit 1"
    page.write_text(
        f"# A\n\n    {facts}   # good\n    mosectl check none.jsonl\n    mosectl merge a b -o c.safetensors\n"
    )
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert next(c.text for c in docs.commands(page)) == facts
    wrong = docs.run_page(page)
    assert len(wrong) == 2 and "check none.jsonl" in wrong[0] and "ended with 3" in wrong[0] and "merge" in wrong[1]
    model = save(tmp_path / "model")
    for seed, patch in enumerate("ab"):
        patch_for(model, seed=seed).save(tmp_path / patch)
    merge = "    mosectl merge a b -o c.safetensors\n"
    page.write_text(f"# A\n\n{merge}{merge}\n## B\n\n{merge}")
    assert [text.rpartition(" ")[2] for text in docs.run_page(page)] == ["7"], "the second of the first section"


def test_the_tables_hold_nothing_stale() -> None:
    texts = {command.text for command in ALL}
    assert set(docs.NOT_RUN) <= texts and all(docs.NOT_RUN.values())
    for table in (docs.SHORT, docs.MAY_END):
        assert [start for start in table if not any(text.startswith(start) for text in texts)] == []
    for table in (docs.MEANT, docs.NEEDS):
        assert [part for part in table if not any(part in text for text in texts)] == []


def test_nothing_is_overlooked() -> None:
    """Lines of code that name the tool, but do not begin with it, would not be run."""
    lines = [line for page in docs.pages() for _, kind, text in docs.blocks(page) for line in text.splitlines()]
    named = [line for line in lines if "mosectl " in line.partition("# ")[0]]
    known = ("mosectl ", "from mosectl", "import mosectl", "pip install", "accelerate launch")
    assert [line for line in named if not line.strip().removeprefix("$ ").startswith(known)] == []
    assert len(ALL) > 40 and len(PAGES) > 7


def snippets(page: Path) -> list[str]:
    """Blocks of Python that use the package, or a library with what it wrote; those of the README are run once."""
    starts = ("import ", "from ", "with ")
    known = {t for _, _, t in docs.blocks(ROOT / "README.md")} if page.name != "README.md" else set()
    return [t for _, _, t in docs.blocks(page) if t.startswith(starts) and t not in known]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [p for p in docs.pages() if snippets(p)], ids=docs.name)
def test_python_runs(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs.prepare(tmp_path, made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(DEMO)
    names: dict[str, Any] = {"mosectl": mosectl, "facts": "facts.jsonl"}
    for text in snippets(page):
        if "model, mosectl.Patch" in text:
            names["model"] = load("MODEL").model
        if "BitsAndBytesConfig" in text and find_spec("bitsandbytes") is None:
            continue
        if "PeftModel" in text:
            pytest.importorskip("peft")
            for name in {"adapter", "first", "second"} - {p.name for p in tmp_path.iterdir()}:
                assert run("export", "a.safetensors", "--model", DEMO, "-o", name) == 0
        exec(compile(text, docs.name(page), "exec"), names)
    assert "result" not in names or names["result"].patch.facts
