# SPDX-License-Identifier: Apache-2.0
"""The kernels of the layers, in what vLLM hashes to find the compiled graphs of an earlier run.

From torch 2.10 on, vLLM stores compiled graphs without their guards, under a hash of its own configuration and of the
environment variables that it knows. The kernel of a layer depends on more: whether the fused library is installed and
works, and variables of ours.
"""

import vllm.envs

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.ops.npu.select import Kernel

HASHED = "W4A4_NPU_KERNELS"
"""Name of the entry in vLLM's table of environment variables; it is no variable."""

kernels: dict[str, Kernel] = {}
"""Kernel of each layer of this process, by prefix; set while the model is created, read when it is compiled."""


def hash_kernels() -> None:
    """Let vLLM hash `kernels`. Idempotent."""
    vllm.envs.environment_variables[HASHED] = lambda: str((envs.VLLM_W4A4_LOCAL_SCALES, sorted(kernels.items())))
