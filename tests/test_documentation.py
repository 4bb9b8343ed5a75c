# SPDX-License-Identifier: Apache-2.0
"""Links between the pages lead somewhere, and the drawing of the package is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "ascendc_emulator/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INDENT = 4


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def drawn() -> list[Path]:
    """The paths in the drawing of architecture.md, relative to the repository."""
    drawing = re.search(r"```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert drawing is not None
    paths: list[Path] = []
    folders: list[str] = []
    for line in drawing[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // INDENT
        paths.append(Path(*folders[:depth], name))
        if name.endswith("/"):
            folders = [*folders[:depth], name]
    return paths


def test_everything_in_the_drawing_exists() -> None:
    assert [str(path) for path in drawn() if not (ROOT / path).exists()] == []


def test_folders_are_drawn_with_all_their_files_or_with_none() -> None:
    paths = set(drawn())
    missing = {
        str(file.relative_to(ROOT))
        for folder in {path.parent for path in paths if path.parts[0] == "vllm_w4a4_plugin" and len(path.parts) > 1}
        for file in (ROOT / folder).iterdir()
        if (file.suffix == ".py" or (file / "__init__.py").exists())
        and (file.name != "__init__.py" or folder == Path("vllm_w4a4_plugin"))
        and file.relative_to(ROOT) not in paths
    }
    assert missing == set()
