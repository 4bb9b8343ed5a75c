# SPDX-License-Identifier: Apache-2.0
"""W4A8_DYNAMIC and W4A8_FLATQUANT_DYNAMIC: int4 weights, int8 activations per token.

Scales are per channel, or `weight_scale` [output_size] times the factors `weight_scale_second` [output_size, groups].
Weights are symmetric. The two forms of the weight that msModelSlim writes, one or two values per byte, are loaded.
"""

import torch

from vllm_w4a4_plugin.checkpoint import QuantType

from .base import Layer
from .registry import register_scheme
from .w4a4 import W4A4Scheme
from .w4a4_dynamic import W4A4DynamicScheme
from .w4a4_flatquant_dynamic import W4A4FlatQuantDynamicScheme


class SymmetricInt4(W4A4Scheme):
    """Offsets, which are checked to be zero, are not used."""

    def _offset(self, layer: Layer) -> torch.Tensor | None:
        return None


@register_scheme(QuantType.W4A8_DYNAMIC)
class W4A8DynamicScheme(SymmetricInt4, W4A4DynamicScheme):
    """As W4A4_DYNAMIC, with scale max|x| / 127 and activations in [-127, 127]."""

    def process_weights_after_loading(self, layer: Layer) -> None:
        # Once after each load: only newly loaded factors are not yet multiplied by the scale of their row.
        if self.spec.has_second_scale and not layer.weight_scale_second.is_settled:
            factors = layer.weight_scale_second.data
            factors.mul_(layer.weight_scale.data.view(-1, *[1] * (factors.dim() - 1)))

    def _scale(self, layer: Layer) -> torch.Tensor:
        return layer.weight_scale_second if self.spec.has_second_scale else layer.weight_scale


@register_scheme(QuantType.W4A8_FLATQUANT_DYNAMIC)
class W4A8FlatQuantDynamicScheme(SymmetricInt4, W4A4FlatQuantDynamicScheme):
    """As W4A4_FLATQUANT_DYNAMIC, with scale clip_ratio * max|x'| / 127 and activations in [-127, 127]."""
