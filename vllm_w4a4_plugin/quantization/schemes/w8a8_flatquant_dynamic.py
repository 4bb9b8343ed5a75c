# SPDX-License-Identifier: Apache-2.0
"""W8A8_FLATQUANT_DYNAMIC: an online Kronecker transform, then int8 activations per token and int8 weights."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api

from .base import Layer, LayerShape
from .int8 import Int8Scheme
from .registry import register_scheme
from .transform import register_transform


@register_scheme(QuantType.W8A8_FLATQUANT_DYNAMIC)
class W8A8FlatQuantDynamicScheme(Int8Scheme):
    """In a row-parallel layer the ranks send each other their parts of a token, all of which the transform mixes."""

    operator_name = "w8a8_linear"

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self._register_scales(layer, shape, weight_loader)
        register_transform(self, layer, weight_loader)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        transform = (layer.left_trans, layer.right_trans, layer.clip_ratio)
        return api.w8a8_linear(x, layer.weight, layer.weight_scale, bias, *transform)
