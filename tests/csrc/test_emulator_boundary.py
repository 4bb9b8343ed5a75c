# SPDX-License-Identifier: Apache-2.0
"""The Ascend C emulator is a tool of its own, and the kernels reach it only through its public headers."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "ascendc_emulator"
PUBLIC_HEADERS = {
    "kernel_operator.h",
    *(f"ascendc_emulator/{name}" for name in ("launch.h", "options.h", "report.h")),
}
CPP_SUFFIXES = (".h", ".hpp", ".cpp")
MAX_LINES = 400
INCLUDE = re.compile(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', re.MULTILINE)
OUR_NAMES = re.compile(r"w4a4|flatquant|vllm|csrc|qwen|tiling", re.IGNORECASE)


def files(*suffixes: str, under: Path = ROOT) -> list[Path]:
    """Files in the working tree, without build directories and environments."""
    found = [
        path
        for path in under.rglob("*")
        if path.suffix in suffixes and not {".venv", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
    ]
    assert found, f"no {suffixes} under {under}"
    return sorted(found)


def includes(path: Path) -> list[tuple[str, bool]]:
    """Each include of a file, and whether it is in quotes."""
    return [(name[1:-1], name[0] == '"') for name in INCLUDE.findall(path.read_text())]


def resolve(path: Path, name: str, directories: list[Path]) -> Path | None:
    """The file of this repository that `#include "name"` in `path` means."""
    candidates = (directory / name for directory in [path.parent, *directories])
    return next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)


@pytest.mark.parametrize("path", files(*CPP_SUFFIXES, under=EMULATOR), ids=lambda path: str(path.relative_to(ROOT)))
def test_emulator_includes_only_itself(path: Path) -> None:
    for name, is_quoted in includes(path):
        if not is_quoted:
            assert not name.endswith(CPP_SUFFIXES) or name.startswith("sys/") or name == "ucontext.h", name
            continue
        target = resolve(path, name, [EMULATOR / "include", EMULATOR / "src"])
        assert target is not None, f"{name} is not a file of the emulator"
        assert target.is_relative_to(EMULATOR), name


def test_emulator_public_headers_do_not_need_the_machine() -> None:
    for path in files(".h", under=EMULATOR / "include"):
        for name, is_quoted in includes(path):
            target = resolve(path, name, [EMULATOR / "include"]) if is_quoted else None
            assert target is None or target.is_relative_to(EMULATOR / "include"), f"{path} includes {name}"


@pytest.mark.parametrize("path", files(".py", under=EMULATOR), ids=lambda path: str(path.relative_to(ROOT)))
def test_emulator_imports_only_the_standard_library(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        for module in modules:
            assert module.split(".")[0] in sys.stdlib_module_names, module


def test_emulator_does_not_name_our_kernels() -> None:
    texts = files(*CPP_SUFFIXES, ".py", ".txt", ".md", ".cmake", under=EMULATOR)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OUR_NAMES.search(line)
    ]
    assert found == []


def test_kernels_use_public_headers_only() -> None:
    users = set()
    for path in files(*CPP_SUFFIXES, under=ROOT / "csrc"):
        for name, _ in includes(path):
            target = resolve(path, name, [])
            assert target is None or not target.is_relative_to(EMULATOR), f"{path} includes {name} by its path"
            if (EMULATOR / "include" / name).is_file() and target is None:
                assert name in PUBLIC_HEADERS, f"{path} includes {name}"
                users.add(path)
    assert users, "nothing in csrc uses the emulator"


def test_device_sources_know_only_the_ascendc_header() -> None:
    for directory in ("kernels", "host"):
        for path in files(*CPP_SUFFIXES, under=ROOT / "csrc/npu" / directory):
            assert "emulat" not in path.read_text().lower(), path


def test_no_long_cpp_file() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files(*CPP_SUFFIXES)}
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_emulator_configures_alone(tmp_path: Path) -> None:
    """CMake accepts a copy of the directory, away from this repository."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("cmake", path=path) is None or shutil.which("g++") is None:
        pytest.skip("cmake and g++ are needed (Debian: apt-get install cmake g++)")
    shutil.copytree(EMULATOR, tmp_path / "source")
    environment = {**{key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}, "PATH": path}
    command = ["cmake", "-S", str(tmp_path / "source"), "-B", str(tmp_path / "build")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    listed = subprocess.run(
        ["ctest", "--test-dir", str(tmp_path / "build"), "--show-only"], capture_output=True, text=True, env=environment
    )
    assert "Total Tests: 9" in listed.stdout
