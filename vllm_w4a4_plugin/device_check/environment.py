# SPDX-License-Identifier: Apache-2.0
"""Versions, environment and the device itself, before anything is computed on it."""

from collections.abc import Mapping
from typing import Any

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.capacity.devices import DEVICES, GIB
from vllm_w4a4_plugin.capacity.versions import NOT_FOUND

from .outcome import Outcome, Status, failed, passed

MINIMUM = {"CANN": (8, 5), "torch-npu": (2, 10), "torch": (2, 10)}
"""Oldest versions that have what the plugin calls: 262144 tokens in a call of npu_kronecker_quant, and vllm-ascend
0.20.2's torch."""

FREE_MEMORY = 4 * GIB
"""Bytes that the largest layer of the check may need."""


def version_outcomes(versions: Mapping[str, str]) -> list[tuple[str, Outcome]]:
    """One line per component, (title, outcome), from `capacity.versions.found_versions`."""
    return [(name, _version_outcome(name, found)) for name, found in versions.items()]


def set_env_outcome() -> Outcome:
    """Whether CANN's set_env.sh was sourced."""
    if envs.ASCEND_HOME_PATH:
        return passed(f"sourced, CANN is in {envs.ASCEND_HOME_PATH}")
    return failed("not sourced: run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` (CANN 9: cann/set_env.sh)")


def device_outcome(name: str, cubes: int | None, vectors: int | None, free: int, total: int) -> Outcome:
    """What the device says of itself.

    Args:
        name: as torch_npu gives it, e.g. "Ascend910B2".
        cubes, vectors: numbers of cores, None if this torch_npu does not tell.
        free, total: bytes of memory.
    """
    known = next((device for device in DEVICES.values() if device.name in name), None)
    facts: dict[str, Any] = {"name": name, "cubes": cubes, "vectors": vectors, "free": free, "total": total}
    cores = f"{cubes} cube and {vectors} vector cores" if cubes is not None else "core count unknown"
    text = f"{name}, {cores}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if cubes is not None and vectors is not None and vectors != 2 * cubes:
        return failed(f"{text}: the fused kernel needs two vector cores for each cube core", **facts)
    if known is not None and cubes is not None and cubes != known.cubes:
        return failed(
            f"{text}: a {known.name} has {known.cubes} cube cores. Is the device divided (vNPU), or are driver and "
            "firmware of different versions?",
            **facts,
        )
    if free < FREE_MEMORY:
        return Outcome(Status.NOTE, f"{text}: less than {FREE_MEMORY / GIB:.0f} GiB, see `npu-smi info`", facts)
    if known is None:
        return Outcome(Status.NOTE, f"{text}: not one of {', '.join(DEVICES)}", facts)
    return passed(text, **facts)


def _version_outcome(name: str, found: str) -> Outcome:
    if found == NOT_FOUND:
        return failed(NOT_FOUND) if name in MINIMUM else Outcome(Status.NOTE, NOT_FOUND)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if name in MINIMUM and numbers < MINIMUM[name]:
        return failed(f"{found}, needs {'.'.join(map(str, MINIMUM[name]))} or later", version=found)
    return passed(found, version=found)
