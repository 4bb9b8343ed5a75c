# SPDX-License-Identifier: Apache-2.0
"""The parameters of the online Kronecker transform of the FlatQuant types."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO, LEFT_TRANS, RIGHT_TRANS
from vllm_w4a4_plugin.quantization.parameters.shared import ClipRatioParameter, TransformParameter

from .base import Layer, LinearScheme


def register_transform(scheme: LinearScheme, layer: Layer, weight_loader: Callable[..., Any]) -> None:
    """Register `left_trans`, `right_trans` (None where absent: the identity) and `clip_ratio` [shards], float32."""
    for suffix, size in ((LEFT_TRANS, scheme.spec.left), (RIGHT_TRANS, scheme.spec.right)):
        factor = None
        if size is not None:
            data = torch.zeros(size, size, dtype=torch.float32)
            factor = TransformParameter(data, plan=scheme.plan, suffix=suffix, weight_loader=weight_loader)
        layer.register_parameter(suffix, factor)
    clips = torch.ones(len(scheme.plan.shards), dtype=torch.float32)
    clip = ClipRatioParameter(clips, plan=scheme.plan, suffix=CLIP_RATIO, weight_loader=weight_loader)
    layer.register_parameter(CLIP_RATIO, clip)
