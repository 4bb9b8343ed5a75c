# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: which part may import which, and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vllm_w4a4_plugin"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

LEAVES = {"constants", "envs", "text"}
"""Modules that import nothing of the package but one another."""

MAY_IMPORT = {
    "constants": set(),
    "envs": set(),
    "text": set(),
    "catalogue": set(),
    "checkpoint": LEAVES,
    "ops": LEAVES | {"checkpoint"},
    "quantization": LEAVES | {"checkpoint", "ops"},
    "calibration": LEAVES | {"checkpoint", "ops"},
    "capacity": LEAVES | {"checkpoint", "ops", "calibration"},
    "device_check": LEAVES | {"checkpoint", "ops", "capacity"},
    "evaluation": LEAVES | {"checkpoint"},
    "platforms": LEAVES | {"checkpoint", "quantization"},
    "cli": LEAVES | {"checkpoint", "ops", "calibration", "capacity", "device_check", "evaluation", "catalogue"},
    "__init__": LEAVES | {"platforms"},
}

FORBIDDEN = {
    "checkpoint": {"torch", "vllm", "torch_npu", "vllm_ascend"},
    "ops": {"vllm", "vllm_ascend"},
    "calibration": {"vllm", "vllm_ascend"},
    "capacity": {"vllm", "torch_npu", "vllm_ascend"},
    "device_check": {"vllm", "vllm_ascend"},
}
"""Other packages, wherever in a file they are imported; annotations do not count."""


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, `module.name` for `from module import name`."""
    here = file.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(file.read_text())
    only_types = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    part = part_of(file)
    for name in imports(file):
        root, _, rest = name.partition(".")
        if root == PACKAGE:
            target = rest.partition(".")[0]
            assert (ROOT / PACKAGE / target).is_dir() or (ROOT / PACKAGE / f"{target}.py").is_file(), (
                f"{file}: takes the name {target!r} from the package's __init__"
            )
            assert target == part or target in MAY_IMPORT[part], f"{file}: {part} imports {name}"
        assert root not in FORBIDDEN.get(part, ()), f"{file}: {part} imports {name}"


def test_only_envs_reads_the_environment() -> None:
    readers = {
        str(file.relative_to(ROOT))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
    }
    assert readers == {f"{PACKAGE}/envs.py"}


def test_python_files_are_short() -> None:
    files = (
        file for folder in (PACKAGE, "tests", "benchmarks", "tools", "csrc") for file in (ROOT / folder).rglob("*.py")
    )
    long = {str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text().splitlines())) > 300}
    assert long == {}
