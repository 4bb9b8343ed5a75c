# SPDX-License-Identifier: Apache-2.0
"""W8A8_DYNAMIC: int8 weights per channel, int8 activations per token, through vLLM's own CPU kernels."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.kernels.linear import init_int8_linear_kernel

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.layer import WEIGHT
from vllm_w4a4_plugin.quantization.parameters import RowsParameter

from .base import LayerShape, LinearScheme


class W8A8DynamicScheme(LinearScheme):
    """vLLM's kernel repacks the weight and drops the original; vLLM's reload restores it before loading again."""

    def create_weights(self, layer: torch.nn.Module, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        self.shape = shape
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name=type(self).__name__
        )
        # Attributes that vLLM's kernels read.
        layer.logical_widths = layer.output_partition_sizes
        for absent in ("input_scale", "input_zero_point", "azp_adj"):
            layer.register_parameter(absent, None)
        weight = RowsParameter(
            torch.zeros(shape.rows, shape.columns, dtype=torch.int8),
            rows=shape.rows,
            columns=shape.columns,
            source=self.source,
            suffix=WEIGHT,
            weight_loader=weight_loader,
        )
        layer.register_parameter(WEIGHT, weight)
        self._register_scales(layer, shape, weight_loader)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.spec.has_offset and bool(layer.weight_offset.any()):
            raise CheckpointError(
                f"layer {self.source.prefix}, tensor {self.source.tensor_name('weight_offset', None)}: expected zeros, "
                "found other values. vLLM's int8 kernels need symmetric weights; quantize this layer symmetrically."
            )
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)

    @property
    def operator(self) -> str:
        return f"vLLM {type(self.kernel).__name__}"

    def weight_bytes(self, layer: torch.nn.Module) -> int:
        return self.shape.rows * self.shape.columns
