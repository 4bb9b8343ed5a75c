# SPDX-License-Identifier: Apache-2.0
"""W4A4_FLATQUANT_DYNAMIC: an online Kronecker transform before the per-token quantization."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO, LEFT_TRANS, RIGHT_TRANS
from vllm_w4a4_plugin.ops import api
from vllm_w4a4_plugin.quantization.parameters.shared import ClipRatioParameter, TransformParameter

from .base import Layer, LayerShape
from .registry import register_scheme
from .w4a4 import W4A4Scheme


@register_scheme(QuantType.W4A4_FLATQUANT_DYNAMIC)
class W4A4FlatQuantDynamicScheme(W4A4Scheme):
    """A missing transform factor is the identity.

    The transform mixes all input features. In a row-parallel layer, each rank therefore gathers the whole token,
    transforms and quantizes it, and multiplies its own part of it: the int4 values and the scale of a token are the
    same as on one rank.
    """

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        super().create_weights(layer, shape, weight_loader)
        self.is_row_parallel = shape.is_row_parallel
        for suffix, size in ((LEFT_TRANS, self.spec.left), (RIGHT_TRANS, self.spec.right)):
            factor = None
            if size is not None:
                data = torch.zeros(size, size, dtype=torch.float32)
                factor = TransformParameter(data, plan=self.plan, suffix=suffix, weight_loader=weight_loader)
            layer.register_parameter(suffix, factor)
        clips = torch.ones(len(self.plan.shards), dtype=torch.float32)
        clip = ClipRatioParameter(clips, plan=self.plan, suffix=CLIP_RATIO, weight_loader=weight_loader)
        layer.register_parameter(CLIP_RATIO, clip)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        transform = (layer.left_trans, layer.right_trans, layer.clip_ratio)
        offset = self._offset(layer)
        if not self.is_row_parallel:
            return api.flatquant_linear(x, layer.weight, layer.weight_scale, *transform, bias, weight_offset=offset)
        columns = x.shape[-1]
        q, scale = api.kronecker_quant(tensor_model_parallel_all_gather(x), *transform)
        q = q.narrow(-1, layer.tp_rank * columns, columns).contiguous()
        return api.int4_linear(q, scale, layer.weight, layer.weight_scale, bias, offset, x.dtype)
