# SPDX-License-Identifier: Apache-2.0
"""Figures of Ascend devices, from public tables; docs/npu.md says where they come from."""

from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint import CheckpointError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One NPU: an A3 package holds two.

    Attributes:
        name: as `npu-smi info` shows it, without "Ascend".
        memory: bytes of HBM.
        bandwidth: of HBM, bytes per second.
        half_operations: dense fp16 operations of the cubes per second; int8 has twice, int4 four times as many.
        cubes: number of cube cores; there are twice as many vector cores.
    """

    name: str
    memory: int
    bandwidth: float
    half_operations: float
    cubes: int

    def operations(self, activation_bits: int) -> float:
        """Dense operations per second with operands of 16, 8 or 4 bits."""
        return self.half_operations * 16 / activation_bits


# A cube does 16x16x16 fp16 multiply-adds per cycle; at 1.8 GHz, 24 of them 354 T, 20 of them 295 T operations.
_CUBES_24, _CUBES_20 = 354e12, 295e12
_HBM = 1.6e12

DEVICES = {
    device.name: device
    for device in (
        Device("910B1", 64 * GIB, _HBM, _CUBES_24, 24),
        Device("910B2", 64 * GIB, _HBM, _CUBES_24, 24),
        Device("910B3", 64 * GIB, _HBM, _CUBES_20, 20),
        Device("910_93", 64 * GIB, _HBM, _CUBES_24, 24),
    )
}


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        CheckpointError: its figures are not known.
    """
    if name not in DEVICES:
        raise CheckpointError(
            f"unknown device {name!r}; known devices: {', '.join(DEVICES)} (910_93 is one die of an A3)."
        )
    return DEVICES[name]
