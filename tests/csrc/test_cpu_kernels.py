# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels without torch and runs their C++ conformance test, once for each CMake preset."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The environment has a cmake of its own where the system has none.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# vLLM's CPU platform preloads libraries into processes started after it; AddressSanitizer must come first.
ENVIRONMENT = {**{key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}, "PATH": PATH}
ROOT = Path(__file__).parents[2]
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def missing(preset: str) -> str | None:
    """What keeps the preset from running here, with the remedy."""
    if shutil.which("cmake", path=PATH) is None or shutil.which("g++") is None:
        return "cmake and g++ are needed (Debian: apt-get install cmake g++)"
    if preset == "simde" and not IS_X86:
        return "emulates x86 instructions on x86"
    if preset == "simde" and not Path("/usr/include/simde").is_dir():
        return "SIMDe is needed (Debian: apt-get install libsimde-dev)"
    if preset == "threads" and not os.environ.get("W4A4_TSAN"):
        return "takes two and a half minutes of a core; W4A4_TSAN=1 runs it"
    if preset == "aarch64" and not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")):
        return "a cross compiler is needed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    return None


@pytest.mark.timeout(1800)  # under qemu, beside another test
@pytest.mark.parametrize("preset", ["native", "sanitize", "threads", "simde", "aarch64"])
def test_conformance(preset: str, tmp_path: Path) -> None:
    if reason := missing(preset):
        pytest.skip(reason)
    build = tmp_path / preset
    for command in (
        ["cmake", "--preset", preset, "-B", str(build)],
        ["cmake", "--build", str(build), "--parallel", "2"],
        ["ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error"],
    ):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-5000:]}\n{result.stderr[-3000:]}"
        assert "warning:" not in result.stdout + result.stderr
