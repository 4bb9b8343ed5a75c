# SPDX-License-Identifier: Apache-2.0
"""The documented installation, in an environment like that of vllm-ascend's image: with W4A4_CONTAINER=1.

Ubuntu 22.04's tools (g++ 11 as the only C++ compiler, CMake 3.22), a fresh virtual environment with what
docker/Dockerfile installs, no torch_npu, no CANN. The commands are taken from docs/npu.md and run by bash. Only where
CPU kernels are built is torch needed; it is lent from the environment of the tests, as the image has it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_w4a4_plugin.constants import VERSION

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "micro-qwen3-w4a4"
TOOLS = (
    "bash",
    "sh",
    "env",
    "ls",
    "cat",
    "rm",
    "mkdir",
    "uname",
    "grep",
    "sed",
    "make",
    "ld",
    "as",
    "ar",
    "ranlib",
    "git",
)

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("W4A4_CONTAINER"),
        reason="three fresh environments from the package index, some minutes of CI: W4A4_CONTAINER=1 runs it",
    ),
    pytest.mark.skipif(shutil.which("g++-11") is None, reason="g++-11 is needed (Debian 12: apt-get install g++-11)"),
]


def documented(words: str) -> str:
    """The command of docs/npu.md's installation that contains `words`."""
    section = (ROOT / "docs" / "npu.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    (command,) = [line for line in section.splitlines() if "pip install" in line and words in line]
    return command.partition(" #")[0].strip()


class Container:
    """A fresh virtual environment, and a path with nothing but its programs and the old tools."""

    def __init__(self, place: Path, source: Path) -> None:
        self.source = source
        self.venv = place / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)
        old = place / "bin"
        old.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (old / tool).symlink_to(found)
        for name in ("g++", "c++"):
            (old / name).symlink_to(shutil.which("g++-11") or "")
        for name in ("gcc", "cc"):
            (old / name).symlink_to(shutil.which("gcc-11") or "")
        kept = ("HOME", "TMPDIR", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE")
        self.environment = {key: os.environ[key] for key in kept if key in os.environ}
        self.environment |= {"PATH": f"{self.venv / 'bin'}:{old}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        requirements = re.search(r'pip install --no-cache-dir (".*) \\', (ROOT / "docker" / "Dockerfile").read_text())
        assert requirements is not None
        self.bash(f"pip install -q {requirements[1].replace('cmake>=3.22', 'cmake==3.22.*')}")
        assert "cmake version 3.22" in self.bash("cmake --version")
        assert "11." in self.bash("g++ -dumpfullversion")

    def bash(self, command: str) -> str:
        """What a command prints, run in the plugin's source directory."""
        result = subprocess.run(
            ["bash", "-c", command], cwd=self.source, env=self.environment, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    def installed(self) -> list[str]:
        """Names of the package's native libraries."""
        code = "import vllm_w4a4_plugin, pathlib; print(pathlib.Path(vllm_w4a4_plugin.__file__).parent)"
        package = Path(self.bash(f"cd / && python -c '{code}'").strip())
        assert package.is_relative_to(self.venv), package
        return sorted(path.name for path in package.rglob("*.so"))

    def check_commands(self) -> None:
        assert (
            self.bash("cd / && python -c 'import importlib.util as u; print(u.find_spec(\"torch_npu\"))'") == "None\n"
        )
        assert VERSION in self.bash("cd / && vllm-w4a4 --version")
        assert "W4A4_FLATQUANT_DYNAMIC" in self.bash(f"cd / && vllm-w4a4 inspect {MODEL}")
        found = self.bash(f"cd / && vllm-w4a4 doctor {MODEL}")
        assert "It fits." in found
        assert re.search(r"^torch-npu +not found$", found, re.MULTILINE), found
        assert re.search(r"^CANN +not found$", found, re.MULTILINE), found


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """With a copy of the plugin's source directory, as a user has it."""
    place = tmp_path_factory.mktemp("container")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__")
    shutil.copytree(ROOT, place / "plugin", ignore=ignored)
    return Container(place, place / "plugin")


def test_pure_python(container: Container) -> None:
    container.bash(documented("W4A4_CPU=OFF pip install --no-deps ."))
    assert container.installed() == []
    container.check_commands()
    # The image has torch; this environment has not.
    with pytest.raises(AssertionError, match="needs torch, which") as failed:
        container.bash(f"cd / && vllm-w4a4 verify {MODEL}")
    assert "Traceback" not in str(failed.value)


def test_the_fused_library_says_what_is_missing(container: Container) -> None:
    with pytest.raises(AssertionError, match="W4A4_NPU=ON, but"):
        container.bash(documented("W4A4_NPU=ON"))


def test_cpu_kernels(container: Container) -> None:
    import torch

    lent = Path(torch.__file__).parent
    (packages,) = container.venv.glob("lib/python*/site-packages")
    (packages / "torch").symlink_to(lent)
    (packages / "what_torch_needs.pth").write_text(str(lent.parent))
    container.bash("pip install --no-build-isolation --no-deps --force-reinstall .")
    assert container.installed() == ["libvllm_w4a4.so"]
    container.check_commands()
    assert container.bash(f"cd / && vllm-w4a4 verify {MODEL}").strip().endswith(": good")
    code = "from vllm_w4a4_plugin import ops; print(ops.cpu_instruction_set())"
    assert container.bash(f"cd / && python -c '{code}'").strip()
