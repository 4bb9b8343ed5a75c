# SPDX-License-Identifier: Apache-2.0
"""The wheel is installed into a fresh environment without compiler, make and sources, and serves a checkpoint there.

It is built by the commands of `make wheels`, with the object files that `make setup` compiled, so that this is short.
vLLM, torch and other requirements are lent from the environment of the tests. W4A4_WHEELS=1 runs `make wheels` itself.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MICRO
from tests.engine.oracle import prompt_logprobs
from tests.engine.test_offline import TOKENS, TYPICAL_DIFFERENCE
from tools import release
from vllm_w4a4_plugin.constants import VERSION

ROOT = Path(__file__).parents[2]
NEEDED_BY_VLLM = ("sh", "bash", "env", "uname", "lscpu", "numactl", "cat", "grep", "sed", "ls")
START_S = 300

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are built on Linux")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "tools"))  # where setup_environment finds its neighbour
    from tools.setup_environment import build_directory

    place = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", f"--config-settings=build-dir={build_directory(Path(sys.prefix))}"]
    release.run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(place), str(ROOT), W4A4_NPU="OFF")
    return release.repair(release.only(place.glob("*.whl")), tmp_path_factory.mktemp("dist"))


def metadata(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "vllm_w4a4_plugin").rglob("*") if file.is_file()}
    expected = {file for file in files if "__pycache__" not in file and not file.endswith(".so")}
    expected.add(f"vllm_w4a4_plugin/{release.LIBRARY}")
    assert {name for name in names if ".dist-info/" not in name and not name.endswith("/")} == expected
    assert "vllm_w4a4_plugin/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Version"] == VERSION
    assert found["License-Expression"] == "Apache-2.0"
    assert {url.partition(",")[0] for url in found.get_all("Project-URL")} >= {"Repository", "Changelog", "Issues"}
    assert not any("vllm" in requirement or "torch" in requirement for requirement in found.get_all("Requires-Dist"))
    # Every Linux that vLLM's and torch's wheels (manylinux_2_28) run on.
    assert wheel.name.startswith(f"vllm_w4a4_plugin-{VERSION}-py3-none-manylinux_2_")


class Installation:
    """A fresh virtual environment with the wheel, in a place from which the sources cannot be found."""

    def __init__(self, place: Path, wheel: Path) -> None:
        self.place = place
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
        self.python = place / "venv" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        (packages,) = (place / "venv").glob("lib/python*/site-packages")
        # A path in a .pth file comes after the environment's own packages, and .pth files in it have no effect: neither
        # has the editable installation of the sources.
        (packages / "lent.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        tools = place / "bin"
        tools.mkdir()
        for tool in NEEDED_BY_VLLM:
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        self.environment = {
            "PATH": f"{self.python.parent}:{tools}",
            "HOME": str(place),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_W4A4_HEAD": "float",
            # vLLM counts ranks of log probabilities in a function that torch would compile with g++.
            "TORCH_COMPILE_DISABLE": "1",
        }

    def run(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installation"), wheel)


def test_nothing_of_the_sources_is_used(installation: Installation) -> None:
    for tool in ("g++", "c++", "gcc", "cc", "clang", "make", "cmake", "ninja"):
        assert shutil.which(tool, path=installation.environment["PATH"]) is None
    code = (
        "import vllm_w4a4_plugin, torch\nfrom vllm_w4a4_plugin import ops\nops.cpu_instruction_set()\n"
        "print(vllm_w4a4_plugin.__file__, *torch.ops.loaded_libraries, sep='\\n')"
    )
    files = [Path(line) for line in installation.run(str(installation.python), "-c", code).splitlines()]
    assert any(file.name == release.LIBRARY for file in files)
    ours = [file for file in files if "w4a4" in file.name or "w4a4" in str(file.parent.name)]
    assert all(file.is_relative_to(installation.place) for file in ours), ours


def test_the_command(installation: Installation) -> None:
    command = str(installation.python.parent / "vllm-w4a4")
    assert installation.run(command, "--version").strip() == f"vllm-w4a4-plugin {VERSION}"
    assert installation.run(command, "verify", str(MICRO)).endswith(": good\n")


@pytest.fixture
def url(installation: Installation) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(installation.python), "-m", "vllm.entrypoints.cli.main", "serve", str(MICRO), "--port", str(port)]
    command += ["--max-model-len", "128", "--dtype", "float32", "--gpu-memory-utilization", "0.2"]
    log = installation.place / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--served-model-name", "micro"],
            cwd=installation.place, env=installation.environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)
    assert "vllm_w4a4::norm_flatquant_linear" in log.read_text()  # in the start-up table


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-5000:])


@pytest.mark.engine
def test_it_serves_the_model_of_the_formulas(url: str) -> None:
    """The server's log probabilities of a prompt are those of the torch model that computes with the reference."""
    body = {"model": "micro", "prompt": TOKENS, "max_tokens": 1, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]
    found = torch.tensor(choice["logprobs"]["token_logprobs"][1 : len(TOKENS)])
    expected = prompt_logprobs(MICRO, TOKENS)
    assert found.shape == expected.shape
    assert (found - expected).abs().median() < TYPICAL_DIFFERENCE


@pytest.mark.skipif(os.environ.get("W4A4_WHEELS") != "1", reason="two wheels from scratch, minutes: W4A4_WHEELS=1")
@pytest.mark.timeout(1800)
def test_make_wheels(tmp_path: Path) -> None:
    """Source distribution, and wheels of both machines built from it; the one for Arm has instructions of Arm only."""
    machines = release.MACHINES if platform.machine() == "x86_64" else [platform.machine()]
    options = [option for machine in machines for option in ("--machine", machine)]
    release.run(sys.executable, str(ROOT / "tools/release.py"), "--output", str(tmp_path), *options)
    wheels = {machine: release.only(tmp_path.glob(f"*_{machine}.whl")) for machine in machines}
    for machine, file in wheels.items():
        assert metadata(file)["Version"] == VERSION
        with zipfile.ZipFile(file) as archive:
            header = archive.read(f"vllm_w4a4_plugin/{release.LIBRARY}")[:20]
        # ELF's e_machine: 62 for x86-64, 183 for AArch64.
        assert int.from_bytes(header[18:20], "little") == {"x86_64": 62, "aarch64": 183}[machine]
    with tarfile.open(release.only(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "csrc/cpu/dispatch.cpp", "csrc/tests/conformance_test.cpp"} <= names
    installation = Installation(tmp_path / "installation", wheels[platform.machine()])
    code = "from vllm_w4a4_plugin import ops; print(ops.cpu_instruction_set())"
    assert installation.run(str(installation.python), "-c", code).strip()
