# SPDX-License-Identifier: Apache-2.0
"""W8A8: int8 weights, and activations quantized with one scale and offset that calibration has found.

    q = clamp(round(x / input_scale + input_offset), -128, 127)
    y = (q . weight + quant_bias) * deq_scale

with deq_scale = input_scale * weight_scale, and quant_bias = round(bias / deq_scale - input_offset * sum(weight)), as
msModelSlim's description of its format (AscendV1) has it. The layer's bias is part of quant_bias.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, QUANT_BIAS
from vllm_w4a4_plugin.ops import api
from vllm_w4a4_plugin.quantization.parameters.base import DeqScaleParameter, MatrixParameter
from vllm_w4a4_plugin.quantization.parameters.shared import CommonParameter

from .base import Layer, LayerShape
from .int8 import Int8Scheme
from .registry import register_scheme
from .whole_tokens import gather_bytes

INT8_MIN, INT8_MAX = -128, 127
SCALE_BYTES = 4


@register_scheme(QuantType.W8A8)
class W8A8Scheme(Int8Scheme):
    """In a row-parallel layer each rank quantizes its part of a token for all ranks."""

    operator_name = "int8_linear"

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self.has_input_parts = shape.is_row_parallel
        common: dict[str, Any] = {"plan": self.plan, "weight_loader": weight_loader}
        for suffix in (INPUT_SCALE, INPUT_OFFSET):
            data = torch.zeros(1, dtype=torch.float32)
            layer.register_parameter(suffix, CommonParameter(data, suffix=suffix, **common))
        rows = shape.output_size_per_partition
        for suffix, dtype, parameter_class in (
            (QUANT_BIAS, torch.int32, MatrixParameter),
            (DEQ_SCALE, torch.float32, DeqScaleParameter),
        ):
            data = torch.zeros(rows, dtype=dtype)
            parameter = parameter_class(data, sizes=(rows, 1), input_parts=1, suffix=suffix, **common)
            layer.register_parameter(suffix, parameter)
        if self.spec.has_scale:
            self._register_scales(layer, shape, weight_loader)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, scale = quantize_static(x, layer.input_scale, layer.input_offset)
        # The ranks' sums are added up.
        quant_bias = layer.quant_bias if not self.has_input_parts or layer.tp_rank == 0 else None
        return api.int8_linear(q, scale, layer.weight, layer.deq_scale, None, quant_bias, x.dtype)

    def multiply_gathered(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, scale = quantize_static(x, layer.input_scale, layer.input_offset)
        sent = torch.cat((q, scale[..., None].view(torch.int8)), -1)
        codes, scales = gather_bytes(sent).split((q.shape[-1], SCALE_BYTES), -1)
        # All scales are 1, but those of parts that are not finite.
        scale = scales.contiguous().view(torch.float32).squeeze(-1).amax(-1)
        return api.int8_linear(codes.flatten(-2), scale, layer.weight, layer.deq_scale, None, layer.quant_bias, x.dtype)

    def gathered_bytes(self, features: int, dtype: torch.dtype) -> int:
        return features + SCALE_BYTES


def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens quantized with a fixed scale and offset.

    Args:
        x: [..., input_size], any float dtype.
        scale, offset: float32 [1].

    Returns:
        (q int8 [..., input_size], float32 [...]): the second is 1, or NaN for a token that is not finite.
    """
    x = x.float()
    is_finite = x.isfinite()
    q = torch.where(is_finite, x / scale + offset, 0.0).round().clamp(INT8_MIN, INT8_MAX).to(torch.int8)
    return q, torch.where(is_finite.all(-1), 1.0, torch.nan)
