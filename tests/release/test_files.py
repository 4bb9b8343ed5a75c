# SPDX-License-Identifier: Apache-2.0
"""The files that a stranger looks at first agree with the code: version, changelog, hooks, workflow, contributing."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from vllm_w4a4_plugin.constants import VERSION

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""Of changes, in Keep a Changelog."""


def tracked() -> list[Path]:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in files.stdout.splitlines()]


def test_the_version_is_written_in_one_place() -> None:
    word = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    suffixes = {".py", ".toml", ".md", ".txt", ".cpp", ".h", ".yaml", ".yml", ""}
    places = {
        str(file.relative_to(ROOT))
        for file in tracked()
        if file.suffix in suffixes and file.is_file() and word.search(file.read_text(encoding="utf-8"))
    }
    assert places == {"vllm_w4a4_plugin/constants.py", "CHANGELOG.md"}


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", CHANGELOG, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert len(versions) == len(re.findall(r"^## ", CHANGELOG, re.MULTILINE))
    assert all(date for name, date in versions[1:])
    headings = re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)
    assert set(headings) <= set(KINDS)


def test_the_hooks_are_the_linters_of_make_lint() -> None:
    recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    # `$(VENV)/bin/ruff check .` -> "ruff check"; files are given by pre-commit.
    linters = re.findall(r"\$\(VENV\)/bin/([\w-]+(?: [\w-]+)*)", recipe[1])
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for repository in repositories for hook in repository["hooks"]]
    hooks = [re.sub(r"^\.venv/bin/", "", entry) for entry in entries]
    assert [" ".join(hook.split()[: len(linter.split())]) for hook, linter in zip(hooks, linters, strict=True)] == [
        linter.removesuffix(" --") for linter in linters
    ]
    for name in ("--check", "--dry-run", "--Werror"):
        assert (name in recipe[1]) == any(name in hook for hook in hooks), name


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"] == [".ci/run"]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, lines in commands.items():
        for target in re.findall(r"make ([\w-]+)", "\n".join(lines)):
            assert target in targets, f"job {name}: make {target}"


def test_contributing_lists_the_flags_of_the_tests() -> None:
    """Every environment variable that lengthens the tests, and no other."""
    reads = re.compile(r'os\.environ(?:\.get\(|\[)"(W4A4_[A-Z_]+)"')
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "ascendc_emulator").rglob("*.py")]
    read = {name for file in files for name in reads.findall(file.read_text())}
    listed = re.findall(r"^\| `(W4A4_[A-Z_]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(read)


def test_what_may_be_installed_is_what_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.search(
        r"PYTHON_RANGE = \(\((\d+), (\d+)\), \((\d+), (\d+)\)\)", (ROOT / "tools/setup_environment.py").read_text()
    )
    assert versions is not None
    _, low, _, high = map(int, versions.groups())
    assert project["requires-python"] == f">=3.{low}"
    listed = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert listed == [f"3.{minor}" for minor in range(low, high + 1)]
