# SPDX-License-Identifier: Apache-2.0
"""W4A4_DYNAMIC: no online transform, per-token activation scales, weight scales per channel or per group."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api

from .base import Layer, LayerShape
from .registry import register_scheme
from .w4a4 import W4A4Scheme
from .whole_tokens import LOCAL_SCALES_REMARK, MAXIMUM_BYTES, gather_quantized


@register_scheme(QuantType.W4A4_DYNAMIC)
class W4A4DynamicScheme(W4A4Scheme):
    """In a row-parallel layer each rank quantizes its part of a token for all, with the scale of the whole one."""

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self.has_local_scales = shape.is_row_parallel

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return api.flatquant_linear(
            x,
            layer.weight,
            self._scale(layer),
            None,
            None,
            1.0,
            bias,
            weight_offset=self._offset(layer),
            activation_bits=self.activation_bits,
        )

    def multiply_gathered(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, scale = gather_quantized(x, self.activation_bits)
        return api.int4_linear(
            q,
            scale,
            layer.weight,
            self._scale(layer),
            bias,
            self._offset(layer),
            x.dtype,
            activation_bits=self.activation_bits,
        )

    def gathered_bytes(self, features: int, dtype: torch.dtype) -> int:
        return features + MAXIMUM_BYTES

    @property
    def remark(self) -> str:
        return "; ".join(filter(None, (LOCAL_SCALES_REMARK if self.has_local_scales else "", super().remark)))
