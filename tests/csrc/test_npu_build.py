# SPDX-License-Identifier: Apache-2.0
"""The build of the fused NPU library, with stand-ins for CANN's language ASC and for torch_npu (asc_standin/).

The stand-in for the compiler puts a reference to its runtime into a kernel's object, as CANN's does, and only it adds
that runtime when it links. The stand-in for torch_npu cannot be imported, as in a container without the driver. The
host code is compiled with the environment's torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.test_cpu_kernels import ENVIRONMENT, ROOT

STANDIN = Path(__file__).parent / "asc_standin"
CHECK = ROOT / "csrc" / "npu" / "check_symbols.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


def compile_library(output: Path, text: str, *options: str) -> None:
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(output), *options]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Environment variables of a machine with CANN and torch_npu; their libraries are compiled first."""
    if shutil.which("g++") is None or shutil.which("cmake", path=ENVIRONMENT["PATH"]) is None:
        pytest.skip("cmake and g++ are needed (Debian: apt-get install cmake g++)")
    cann = shutil.copytree(STANDIN / "cann", tmp_path / "cann")
    package = shutil.copytree(STANDIN / "site" / "torch_npu", tmp_path / "site" / "torch_npu")
    (package / "lib").mkdir()
    compile_library(
        package / "lib" / "libtorch_npu.so", (package / "torch_npu.cpp").read_text(), f"-I{package / 'include'}"
    )
    platform = (cann / "platform.cpp").read_text()
    compile_library(cann / "lib64" / "libplatform.so", platform, f"-I{cann / 'include'}")
    compile_library(cann / "lib64" / "libtiling_api.so", "")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return {"ASCEND_HOME_PATH": str(cann), "CMAKE_PREFIX_PATH": str(cann / "lib64" / "cmake"), "PYTHONPATH": path}


def configure(build: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    common = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DW4A4_CPU=OFF"]
    return run("cmake", "-S", str(ROOT), "-B", str(build), *common, *options, **environment)


def test_library_is_built_linked_and_checked(installed: dict[str, str], tmp_path: Path) -> None:
    build = tmp_path / "build"
    result = configure(build, installed, "-DW4A4_NPU=ON")
    assert result.returncode == 0, result.stderr
    flags = {
        Path(entry["file"]).name: entry["command"].split()
        for entry in json.loads((build / "compile_commands.json").read_text())
    }
    assert set(flags) >= {"tiling.cpp", "tiling_cache.cpp", "torch_operator.cpp"}
    assert all("-O2" in command for command in flags.values())
    result = run("cmake", "--build", str(build), "--parallel", "2", **installed)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    library = build / "csrc" / "npu" / "libvllm_w4a4_npu.so"
    # The C++ compiler would have linked it too, with this symbol undefined.
    assert "AscendLaunchKernelWithHostArgs" not in run("nm", "-D", "--undefined-only", str(library)).stdout


@pytest.mark.parametrize(
    ("option", "status", "words"), [("ON", 1, "W4A4_NPU=ON, but"), ("AUTO", 0, "NPU kernels are not built:")]
)
def test_what_is_missing_is_named(
    installed: dict[str, str], tmp_path: Path, option: str, status: int, words: str
) -> None:
    shutil.rmtree(tmp_path / "site" / "torch_npu")
    result = configure(tmp_path / "build", installed, f"-DW4A4_NPU={option}")
    text = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == status, text
    assert words in text
    assert "no torch_npu" in text
    assert "--no-build-isolation" in text
    installed["CMAKE_PREFIX_PATH"] = installed["ASCEND_HOME_PATH"] = str(tmp_path / "nothing")
    result = configure(tmp_path / "build2", installed, f"-DW4A4_NPU={option}")
    text = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == status, text
    assert "set_env.sh first; CANN 8 is not supported" in text


class TestCheckOfSymbols:
    @pytest.fixture
    def library(self, tmp_path: Path) -> Path:
        """A library that needs `outer`, and `inner` through it."""
        if shutil.which("g++") is None:
            pytest.skip("g++ is needed (Debian: apt-get install g++)")
        compile_library(tmp_path / "libinner.so", 'extern "C" int in_inner() { return 1; }')
        outer = 'extern "C" int in_inner(); extern "C" int in_outer() { return in_inner(); }'
        compile_library(tmp_path / "libouter.so", outer, f"-L{tmp_path}", "-linner", "-Wl,--no-as-needed")
        text = (
            '#include <cmath>\nextern "C" int in_inner(), in_outer(), nowhere();\n'
            'extern "C" __attribute__((weak)) int optional();\n'
            "double f(double x) { return std::sin(x) + in_inner() + in_outer() + (optional ? optional() : 0)"
        )
        for name, last in (("good", ""), ("bad", " + nowhere()")):
            compile_library(tmp_path / f"lib{name}.so", f"{text}{last}; }}", f"-L{tmp_path}", "-louter")
        return tmp_path

    def test_all_defined(self, library: Path) -> None:
        result = run(sys.executable, str(CHECK), "--search", str(library), "--", str(library / "libgood.so"))
        assert (result.returncode, result.stdout) == (0, "")

    def test_undefined_ones_are_listed(self, library: Path) -> None:
        result = run(sys.executable, str(CHECK), "--search", str(library), "--", str(library / "libbad.so"))
        assert result.returncode == 1
        assert result.stdout.splitlines()[1:] == ["  nowhere"]

    def test_libraries_that_are_missing_are_named(self, library: Path) -> None:
        result = run(sys.executable, str(CHECK), str(library / "libgood.so"))
        assert result.returncode == 1
        assert "These libraries were not found: libouter.so" in result.stdout
