# SPDX-License-Identifier: Apache-2.0
"""FLOAT layers that ranks share out by output features, as quantized ones, so that their sums are those of one rank."""

from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint.types import WEIGHT

from .output_part import OutputPart


def is_shared_out(layer: LinearBase) -> bool:
    """Whether the ranks compute parts of the outputs of this FLOAT layer over whole tokens."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and not envs.VLLM_W4A4_LOCAL_SCALES


def sent_bytes(layer: Any) -> int:
    """Bytes per token that each rank sends to each other one in such a layer."""
    return layer.input_size_per_partition * layer.params_dtype.itemsize


class SharedOutFloatMethod(UnquantizedLinearMethod):
    """vLLM's own method, for the part of the outputs that is this rank's."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        part = self.part = OutputPart.of_rank(layer.tp_rank, layer.tp_size, output_size)

        def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
            assert loaded_weight.shape == (part.total, input_size), "as vLLM's own parameters check it"
            param.data.copy_(loaded_weight.narrow(0, part.first, part.count))

        weight = torch.nn.Parameter(torch.empty(part.count, input_size, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": load})
        layer.register_parameter(WEIGHT, weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = super().apply(layer, tensor_model_parallel_all_gather(x), self.part.bias(layer))
        return self.part.among_all(y)
