# SPDX-License-Identifier: Apache-2.0
"""Which dtype a CPU should compute a checkpoint's unquantized parts in.

x86 CPUs without AVX-512 have no instructions for 16-bit floats. vLLM's unquantized linear layers then fall
back from oneDNN to torch's plain loops, which are several times slower than the same product in float32, and every
operator rounds its result to 8 bits of precision, an error that 4-bit activations amplify.
"""

import platform
from collections.abc import Iterable

import psutil
import torch

from vllm_w4a4_plugin.checkpoint import TensorInfo

MEMORY_SHARE = 0.25
"""Largest share of the available memory that the parameters may take in addition when they are widened."""

_STORED_IN_16_BITS = ("BF16", "F16")


def slow_on_this_cpu(dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` are slow here. False on Arm, where vLLM's kernels do not use oneDNN."""
    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_supported():
        return False
    supported_by_onednn = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported_by_onednn and not supported_by_onednn[dtype]()


def cost_of_float32(tensors: Iterable[TensorInfo]) -> int:
    """Bytes that a checkpoint's unquantized parameters take in float32 in addition to their stored size."""
    return sum(info.nbytes for info in tensors if info.dtype in _STORED_IN_16_BITS)


def affordable(extra_bytes: int) -> bool:
    """Whether this machine has that much memory available, with room left for the rest of the model and its cache."""
    return extra_bytes <= MEMORY_SHARE * psutil.virtual_memory().available
