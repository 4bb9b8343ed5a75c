# SPDX-License-Identifier: Apache-2.0
"""W4A4_DYNAMIC: no online transform, per-token activation scales, weight scales per channel or per group."""

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import api

from .base import Layer
from .registry import register_scheme
from .w4a4 import W4A4Scheme


@register_scheme(QuantType.W4A4_DYNAMIC)
class W4A4DynamicScheme(W4A4Scheme):
    """In a row-parallel layer each rank quantizes its own part of a token, with its own scale."""

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
