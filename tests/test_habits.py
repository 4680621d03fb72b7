"""What the tests ask of themselves."""

from __future__ import annotations

import ast
from pathlib import Path

from support.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or within a function, and every name taken from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
    return found


def test_nothing_imports_a_test_file() -> None:
    tests = {path.stem for path in FILES if path.name.startswith("test_") or path.name == "conftest.py"}
    found = {path.name: names for path in FILES if (names := {n.split(".")[-1] for n in imported(path)} & tests)}
    assert not found, "what tests share goes into tests/support"


def test_conftest_holds_fixtures_only() -> None:
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
            assert any(mark.startswith("pytest.fixture") for mark in marks), ast.unparse(node).splitlines()[0]
