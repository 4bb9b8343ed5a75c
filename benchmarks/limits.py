# SPDX-License-Identifier: Apache-2.0
"""The machine's limits, measured by native loops on torch's threads: memory reads, int8 products and float32 FMA."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from vllm_w4a4_plugin import ops

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "benchmarks"
PEAK_STEPS = 400_000


def load() -> None:
    """Build the native loops if necessary, and load them.

    Raises:
        RuntimeError: the build fails; the text is the compiler's.
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


def dot_products() -> int:
    """Run the fastest int8 products of the instruction set in use for about a millisecond.

    Returns:
        Number of integer operations (two per product); 0 if the peak of the instruction set is unknown.
    """
    return 2 * torch.ops.vllm_w4a4_limits.dot_peak(ops.cpu_instruction_set(), PEAK_STEPS)


def fma() -> int:
    """The same with float32 FMA, two operations each."""
    return 2 * torch.ops.vllm_w4a4_limits.fma_peak(ops.cpu_instruction_set(), PEAK_STEPS)
