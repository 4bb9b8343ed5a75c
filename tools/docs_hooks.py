# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: links that leave docs/ lead to the repository, so that pages work on GitHub and on the site."""

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.hooks.links")
DOCS = Path(__file__).resolve().parent.parent / "docs"
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page's text with such links replaced; one that leads nowhere is a warning, and so an error of `make docs`."""
    folder = (DOCS / page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        if not target.exists():
            logger.warning("%s: no %s in the repository", page.file.src_uri, match[2])
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{config.repo_url}/{kind}/main/{target.relative_to(DOCS.parent)}{match[3]}"

    return LINK.sub(replace, markdown)
