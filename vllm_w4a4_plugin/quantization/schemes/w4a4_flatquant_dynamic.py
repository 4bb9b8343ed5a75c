# SPDX-License-Identifier: Apache-2.0
"""W4A4_FLATQUANT_DYNAMIC: an online Kronecker transform before the per-token quantization."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api

from .base import Layer, LayerShape
from .registry import register_scheme
from .transform import register_transform
from .w4a4 import W4A4Scheme


@register_scheme(QuantType.W4A4_FLATQUANT_DYNAMIC)
class W4A4FlatQuantDynamicScheme(W4A4Scheme):
    """In a row-parallel layer the ranks send each other their parts of a token, all of which the transform mixes."""

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        register_transform(self, layer, weight_loader)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        clip = 1.0 if self.is_widened else layer.clip_ratio
        transform = (layer.left_trans, layer.right_trans, clip)
        return api.flatquant_linear(
            x,
            layer.weight,
            self._scale(layer),
            *transform,
            bias,
            weight_offset=self._offset(layer),
            activation_bits=self.activation_bits,
        )
