# SPDX-License-Identifier: Apache-2.0
"""Versions of the software and the driver that serve a model, as found on this machine."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_w4a4_plugin import envs

NOT_FOUND = "not found"
PACKAGES = ("vllm-w4a4-plugin", "vllm", "vllm-ascend", "torch", "torch-npu")


def found_versions(root: Path = Path("/")) -> dict[str, str]:
    """Component -> version or `NOT_FOUND`.

    Args:
        root: of the file system that is searched for CANN and the driver.
    """
    return {**{name: _package(name) for name in PACKAGES}, "CANN": _cann(root), "driver": _driver(root)}


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_FOUND


def _cann(root: Path) -> str:
    places = [Path(envs.ASCEND_HOME_PATH)] if envs.ASCEND_HOME_PATH else []
    places += [root / "usr/local/Ascend" / name for name in ("cann", "ascend-toolkit/latest", "nnrt/latest")]
    for place in places:
        # The directory's name contains the machine's architecture.
        for file in sorted([*place.glob("*-linux/ascend_*_install.info"), *place.glob("version.cfg")]):
            if found := _value(file, r"^(?:version|runtime_running_version)=\[?([^\]\s:]+(?::[^\]\s]+)?)"):
                return found.rpartition(":")[2]
    return NOT_FOUND


def _driver(root: Path) -> str:
    return _value(root / "usr/local/Ascend/driver/version.info", r"^Version=(\S+)") or NOT_FOUND


def _value(file: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None
