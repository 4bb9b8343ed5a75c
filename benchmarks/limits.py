# SPDX-License-Identifier: Apache-2.0
"""The machine's own limits, measured by native loops on torch's threads: reading memory, int8 products, float32 FMA."""

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vllm_w4a4_plugin import ops

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "benchmarks"
PEAK_STEPS = 2_000_000


def load() -> None:
    """Build the native loops, if need be, and load them.

    Raises:
        RuntimeError: they do not build; the text is the compiler's.
    """
    ops.load_library()
    for command in (
        [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(BUILD),
            "-DW4A4_BUILD_BENCHMARKS=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        ["cmake", "--build", str(BUILD), "--target", "vllm_w4a4_limits", "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    torch.ops.load_library(str(next(BUILD.rglob("libvllm_w4a4_limits.so"))))


def read(tensor: Tensor) -> None:
    """Read every byte of `tensor` once."""
    torch.ops.vllm_w4a4_limits.read(tensor, ops.cpu_instruction_set())


def dot_peak() -> float | None:
    """Integer operations per second (two per product) of the instruction set in use, or None where it is not known."""
    return _peak(torch.ops.vllm_w4a4_limits.dot_peak)


def fma_peak() -> float | None:
    """float32 operations per second (two per FMA) of the instruction set in use, or None where it is not known."""
    return _peak(torch.ops.vllm_w4a4_limits.fma_peak)


def _peak(operator: torch._ops.OpOverloadPacket) -> float | None:
    isa = ops.cpu_instruction_set()
    begin = time.perf_counter()
    products = operator(isa, PEAK_STEPS)
    seconds = time.perf_counter() - begin
    return 2 * products / seconds if products else None
