# SPDX-License-Identifier: Apache-2.0
"""Builds with the oldest tools that we support, those of Ubuntu 22.04 (g++ 11, CMake 3.22), with Clang 15, and none.

vllm-ascend's images are based on Ubuntu 22.04.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.csrc.test_cpu_kernels import ENVIRONMENT, IS_X86, ROOT
from tools.npu_environment import install
from vllm_w4a4_plugin.constants import VERSION

# The half precision type of the host compiler is missing in g++ 11 on x86 only.
COMPILERS = {"g++-11": "g++-11", "clang++-15": "clang-15"}

# The editable installation's finder comes before the path, and its metadata would lend its library.
ONLY_THIS_PACKAGE = """
import importlib.metadata, sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {package!r})
importlib.metadata.distributions = lambda **of: []
import vllm_w4a4_plugin
assert vllm_w4a4_plugin.__file__.startswith({package!r}), vllm_w4a4_plugin.__file__
"""

COMPARE_FLOAT16 = """
import torch
from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import reference
x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).half()
q, scale = ops.kronecker_quant(x, None, None, torch.tensor([0.9]))
expected, expected_scale = reference.kronecker_quant(x, None, None, 0.9)
assert torch.equal(q, expected) and torch.equal(scale, expected_scale)
"""


def require(compiler: str) -> None:
    if not IS_X86:
        pytest.skip("the compilers' half precision type differs on x86 only")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is needed (Debian 12: apt-get install {COMPILERS[compiler]})")


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=600
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def build_wheel(directory: Path, **environment: str) -> tuple[str, Path]:
    """Build a wheel of the package as pip does in an environment that has vLLM; its file name, and it unpacked."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "."]
    run(*command, "--wheel-dir", str(directory), **environment)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "unpacked")
    return wheel.name, directory / "unpacked"


def run_with(package: Path, code: str) -> str:
    """Run Python code that imports this copy of the package."""
    return run(sys.executable, "-c", ONLY_THIS_PACKAGE.format(package=str(package)) + code)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_conform(compiler: str, tmp_path: Path) -> None:
    require(compiler)
    configure = ["cmake", "--preset", "native", "-B", str(tmp_path), f"-DCMAKE_CXX_COMPILER={compiler}"]
    assert "warning:" not in run(*configure) + run("cmake", "--build", str(tmp_path), "--parallel", "2")
    run("ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error")


def test_wheel_with_the_tools_of_ubuntu_22(tmp_path: Path) -> None:
    require("g++-11")
    cmake = install(Path(sys.prefix) / "cmake-3.22", ["cmake==3.22.*"], [])
    path = f"{cmake / 'cmake' / 'data' / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}"
    assert "cmake version 3.22" in run("cmake", "--version", PATH=path)
    name, package = build_wheel(tmp_path, CXX="g++-11", PATH=path, W4A4_NPU="OFF")
    assert "linux" in name
    run_with(package, COMPARE_FLOAT16)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The wheel without CPU kernels, from an environment without compiler and CMake."""
    nothing = str(tmp_path_factory.mktemp("empty"))
    return build_wheel(tmp_path_factory.mktemp("wheel"), W4A4_CPU="OFF", PATH=nothing, CXX="no-compiler")


class TestWithoutCpuKernels:
    def test_the_wheel_is_pure_python(self, built: tuple[str, Path]) -> None:
        name, package = built
        assert name.endswith("-py3-none-any.whl")
        assert not list(package.rglob("*.so"))
        code = "import vllm_w4a4_plugin.cli as cli; cli.main(['--version'])"
        assert VERSION in run_with(package, code)

    def test_a_cpu_operator_says_so(self, built: tuple[str, Path]) -> None:
        code = (
            "from vllm_w4a4_plugin import ops\n"
            "try: ops.cpu_instruction_set()\n"
            "except RuntimeError as error: print(error)"
        )
        found = run_with(built[1], code)
        assert "CPU kernels were not built" in found
        assert "W4A4_CPU=OFF" in found

    def test_cmake_needs_no_compiler_either(self, tmp_path: Path) -> None:
        options = ["-DW4A4_CPU=OFF", "-DW4A4_NPU=OFF", "-DCMAKE_CXX_COMPILER=no-compiler"]
        run("cmake", "-S", str(ROOT), "-B", str(tmp_path), *options)
