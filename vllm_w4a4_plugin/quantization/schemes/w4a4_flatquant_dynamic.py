# SPDX-License-Identifier: Apache-2.0
"""W4A4_FLATQUANT_DYNAMIC: an online Kronecker transform before the per-token quantization."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api

from .base import Layer, LayerShape
from .registry import register_scheme
from .transform import quantize_whole_tokens, register_transform
from .w4a4 import W4A4Scheme


@register_scheme(QuantType.W4A4_FLATQUANT_DYNAMIC)
class W4A4FlatQuantDynamicScheme(W4A4Scheme):
    """In a row-parallel layer, each rank transforms and quantizes whole tokens and multiplies its own part of them."""

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self.is_row_parallel = shape.is_row_parallel
        register_transform(self, layer, weight_loader)
        self.sent_bytes = shape.part_bytes

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        clip = 1.0 if self.is_widened else layer.clip_ratio
        transform = (layer.left_trans, layer.right_trans, clip)
        scale, offset, bits = self._scale(layer), self._offset(layer), self.activation_bits
        if not self.is_row_parallel:
            return api.flatquant_linear(
                x, layer.weight, scale, *transform, bias, weight_offset=offset, activation_bits=bits
            )
        q, token_scale = quantize_whole_tokens(layer, x, transform, bits)
        return api.int4_linear(q, token_scale, layer.weight, scale, bias, offset, x.dtype, activation_bits=bits)
