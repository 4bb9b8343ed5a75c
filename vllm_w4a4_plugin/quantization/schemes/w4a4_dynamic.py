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
from .whole_tokens import LOCAL_SCALES_REMARK, MAXIMUM_BYTES, shares_maximum, token_maximum


@register_scheme(QuantType.W4A4_DYNAMIC)
class W4A4DynamicScheme(W4A4Scheme):
    """In a row-parallel layer each rank quantizes its own part of a token, with the scale of the whole token."""

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self.shares_maximum = shares_maximum(shape)
        self.has_local_scales = shape.is_row_parallel and not self.shares_maximum
        self.sent_bytes = MAXIMUM_BYTES if self.shares_maximum else 0

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
            token_maximum=token_maximum(x) if self.shares_maximum else None,
        )

    @property
    def remark(self) -> str:
        return "; ".join(filter(None, (LOCAL_SCALES_REMARK if self.has_local_scales else "", super().remark)))
