# SPDX-License-Identifier: Apache-2.0
"""W4A4_FLATQUANT_DYNAMIC: an online Kronecker transform before the per-token quantization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import (
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)
from vllm_w4a4_plugin.ops import api

from .base import Layer, LayerShape
from .registry import register_scheme
from .transform import register_transform
from .w4a4 import W4A4Scheme


@register_scheme(QuantType.W4A4_FLATQUANT_DYNAMIC)
class W4A4FlatQuantDynamicScheme(W4A4Scheme):
    """In a row-parallel layer the ranks send each other their parts of a token, all of which the transform mixes."""

    begins_with_steps = True

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        register_transform(self, layer, weight_loader)

    def apply(self, layer: Layer, x: Any, bias: torch.Tensor | None) -> torch.Tensor:
        # Read here, not through torch.nn.Module's attributes: those are Python code, some percent of a small layer.
        stored = layer._parameters
        linear = partial(api.flatquant_linear, x) if isinstance(x, torch.Tensor) else x.linear
        return linear(
            stored[WEIGHT],
            self._scale(layer),
            stored[LEFT_TRANS],
            stored[RIGHT_TRANS],
            torch.ones(1) if self.is_widened else stored[CLIP_RATIO],
            bias,
            weight_offset=self._offset(layer),
            activation_bits=self.activation_bits,
        )

    def _scale(self, layer: Layer) -> torch.Tensor:
        return layer._parameters[WEIGHT_SCALE]

    def _offset(self, layer: Layer) -> torch.Tensor | None:
        return layer._parameters.get(WEIGHT_OFFSET)
