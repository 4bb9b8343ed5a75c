# SPDX-License-Identifier: Apache-2.0
"""The documentation site is built without a warning, and loads nothing from elsewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import docs_hooks

ROOT = Path(__file__).parents[2]
CONFIG = (ROOT / "mkdocs.yml").read_text()


def test_the_navigation_has_every_page_once() -> None:
    pages = re.findall(r"^ +- ([\w./-]+\.md)$", CONFIG, re.MULTILINE)
    there = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 30
    assert sorted(pages) == sorted(there)


class Page:
    class file:
        src_uri = "explanation/page.md"


class Config:
    repo_url = "https://example.invalid/repo"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../../README.md)", "[a](https://example.invalid/repo/blob/main/README.md)"),
        ("[a](../../tests#b)", "[a](https://example.invalid/repo/tree/main/tests#b)"),
        ("[a](../npu.md#serve)", "[a](../npu.md#serve)"),
        ("[a](https://example.invalid/../x)", "[a](https://example.invalid/../x)"),
    ],
)
def test_links_that_leave_the_pages(link: str, expected: str) -> None:
    assert docs_hooks.on_page_markdown(link, Page, Config) == expected


def test_links_that_lead_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    docs_hooks.on_page_markdown("[a](../../no-such-file.md)", Page, Config)
    assert "no-such-file.md" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: make setup")
def test_the_site(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for name in (
        "index.html",
        "reference/errors/index.html",
        "reference/python/index.html",
        "search/search_index.json",
    ):
        assert (site / name).is_file()
    page = (site / "reference/python/index.html").read_text()
    assert "CheckpointReader" in page
    # Nothing is loaded from elsewhere: no fonts, no scripts.
    loads = re.findall(r'<(?:script|link)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert [url for url in loads if "github.com" not in url] == []
