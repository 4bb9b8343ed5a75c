# SPDX-License-Identifier: Apache-2.0
"""SiLU of quantized models that run without torch.compile on CPUs."""

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_w4a4_plugin.constants import METHOD
from vllm_w4a4_plugin.ops import api


class CpuSiluAndMul(SiluAndMul):
    """`SiluAndMul` in one call for quantized models; for others as it is. With torch.compile vLLM calls neither."""

    def __init__(self, **arguments: bool) -> None:
        super().__init__(**arguments)
        model_config = get_current_vllm_config().model_config
        self.is_quantized = model_config is not None and model_config.quantization == METHOD

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        return api.silu_and_mul(x.contiguous()) if self.is_quantized else super().forward_cpu(x)


def register_silu() -> None:
    """Let vLLM create `CpuSiluAndMul` where a model asks for `SiluAndMul`. Idempotent."""
    if SiluAndMul.__name__ not in op_registry_oot:
        SiluAndMul.register_oot(CpuSiluAndMul, name=SiluAndMul.__name__)
