# SPDX-License-Identifier: Apache-2.0
"""W8A16 and W4A16: integer weights with scales and offsets per channel or per group, float activations.

msModelSlim's documents describe W8A16. Of W4A16 they say nothing: its layers are taken to have the same tensors, with
one int4 value in each int8; other forms are refused.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api, cpu
from vllm_w4a4_plugin.quantization.parameters.cpu import Int4Parameter, Int8Parameter

from .base import Layer, LayerShape, LinearScheme
from .registry import register_scheme


@register_scheme(QuantType.W8A16, QuantType.W4A16)
class WeightOnlyScheme(LinearScheme):
    """y = x ((weight - weight_offset) * weight_scale)^T + bias, in float32."""

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        parameter_class = Int4Parameter if self.plan.quant_type.spec.weight_bits == 4 else Int8Parameter
        self._register_weight(layer, shape, weight_loader, parameter_class)
        self._register_scales(layer, shape, weight_loader)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        offset = layer.weight_offset if self.spec.has_offset else None
        return api.weight_only_linear(x, layer.weight, layer.weight_scale, bias, offset)

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::weight_only_linear, {cpu.cpu_instruction_set()}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel()
