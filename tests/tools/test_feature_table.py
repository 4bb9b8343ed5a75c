# SPDX-License-Identifier: Apache-2.0
"""The table of features says what the tests say, and mistakes in the marks are found."""

from pathlib import Path

import pytest

from tools import feature_table
from tools.feature_table import FEATURES, PAGE, ROOT, Mark, marks, page

NAME, OTHER = FEATURES["Interfaces"][:2]


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(list(marks(ROOT / "tests"))), "run python tools/feature_table.py"


def test_marks_of_functions_parameters_and_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.engine, pytest.mark.feature('whole file')]\n"
        "@pytest.mark.feature('one', flag='W4A4_X')\n"
        "def test_one(): ...\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.feature('two', refused='why'))])\n"
        "def test_two(x): ...\n"
    )
    assert list(marks(folder)) == [
        Mark("whole file", "", "", "tests/test_a.py"),
        Mark("one", "", "W4A4_X", "tests/test_a.py::test_one"),
        Mark("two", "why", "", "tests/test_a.py::test_two"),
    ]


def test_what_the_rows_say() -> None:
    text = page([Mark(NAME, "", "W4A4_X", "tests/a.py::test_x"), Mark(OTHER, "why", "", "tests/b.py")])
    assert f"| {NAME} | works | [test_x](../tests/a.py) (with `W4A4_X=1`) |" in text
    assert f"| {OTHER} | refused: why | [b.py](../tests/b.py) |" in text
    assert f"| {FEATURES['Interfaces'][2]} | not tested |  |" in text


def test_mistakes_in_marks_are_errors() -> None:
    with pytest.raises(ValueError, match=r"does not list: flying"):
        page([Mark("flying", "", "", "tests/a.py")])
    with pytest.raises(ValueError, match="one test says that it works"):
        page([Mark(NAME, "", "", "tests/a.py"), Mark(NAME, "why", "", "tests/b.py")])


def test_the_features_are_listed_once() -> None:
    names = [name for group in feature_table.FEATURES.values() for name in group]
    assert len(names) == len(set(names))
