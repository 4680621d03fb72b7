"""Headless Chromium, where there is one; the tests that need it are skipped with a reason where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
# What headless Chromium needs where tests run: root has no sandbox, containers have a small /dev/shm.
ARGUMENTS = ["--disable-gpu", "--disable-dev-shm-usage", "--font-render-hinting=none", "--no-first-run"]


def chromium() -> str:
    """The browser to test with: $MOSECTL_CHROMIUM, or the first that is on the path."""
    found = [os.environ.get("MOSECTL_CHROMIUM"), *map(shutil.which, NAMES), *(p for p in PLACES if Path(p).exists())]
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip("no Chromium here: install Debian's chromium, or say where one is in MOSECTL_CHROMIUM")
    return path


@contextmanager
def started() -> Iterator[Any]:
    """A running browser, of Playwright's."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'mosectl[browser]'"
    )
    path = chromium()
    with api.sync_playwright() as playwright:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, *root])
        try:
            yield browser
        finally:
            browser.close()
