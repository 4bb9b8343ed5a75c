# SPDX-License-Identifier: Apache-2.0
"""Execution without torch.compile on CPUs, and kernels for what stands between the linear layers.

A quantized model spends its time in operators that torch.compile cannot look into, and attention is vLLM's. What is
left to compile are norms and SiLU, which vLLM leaves to torch.compile on CPUs: without it they are up to ten calls of
torch each. vLLM's library has a kernel for norms all the same. Its SiLU takes 12 % of a long prompt, so that is ours.
"""

import logging
from typing import TYPE_CHECKING

import torch

from vllm_w4a4_plugin.constants import LOGGER

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(LOGGER)

OPERATORS = ("rms_norm", "fused_add_rms_norm")
"""Operators of vLLM's for which we name another kernel."""


def prefer_eager(vllm_config: "VllmConfig") -> None:
    """Run without torch.compile, unless a compilation mode or another optimization level than vLLM's default was asked
    for."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    compilation = vllm_config.compilation_config
    if compilation.mode is not None or vllm_config.optimization_level != OptimizationLevel.O2 or not have_kernels():
        return
    compilation.mode, compilation.cudagraph_mode = CompilationMode.NONE, CUDAGraphMode.NONE
    logger.info(
        "Running without torch.compile, which would not make a quantized model faster here. -O1 or -O3 uses it."
    )


def is_eager(vllm_config: "VllmConfig") -> bool:
    """Whether the model runs without torch.compile. vLLM never compiles models with LoRA adapters on CPUs."""
    from vllm.config import CompilationMode

    return vllm_config.compilation_config.mode == CompilationMode.NONE or vllm_config.lora_config is not None


def have_kernels() -> bool:
    """Whether vLLM's library for this CPU has kernels for OPERATORS."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return all(hasattr(torch.ops._C, name) for name in OPERATORS)


def register_kernels() -> None:
    """Offer vLLM's C kernels and ours as implementations of vLLM's operators. Idempotent.

    The platform's `get_default_ir_op_priority` chooses the norms. SiLU is an operator of the older kind, which a class
    replaces; vLLM calls its `forward_cpu` only without torch.compile.
    """
    from vllm_w4a4_plugin.quantization.norms import register_norms
    from vllm_w4a4_plugin.quantization.silu import register_silu

    if have_kernels():
        register_norms()
        register_silu()
