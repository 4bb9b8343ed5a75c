# SPDX-License-Identifier: Apache-2.0
"""The online Kronecker transform of the FlatQuant types: its parameters, and tokens that are spread over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO, LEFT_TRANS, RIGHT_TRANS
from vllm_w4a4_plugin.ops import api
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


def quantize_whole_tokens(
    layer: Layer,
    x: torch.Tensor,
    transform: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | float],
    activation_bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of tokens that were transformed and quantized as a whole.

    The transform mixes all input features, so every rank of a row-parallel layer gathers the whole token: its values
    and its scale are the same as on one rank.

    Args:
        layer: row-parallel.
        x: this rank's part of the tokens, [..., input_size].
        transform: left_trans, right_trans, clip_ratio.
        activation_bits: 4 or 8.

    Returns:
        (q int8 [..., input_size], scale float32 [...]).
    """
    columns = x.shape[-1]
    q, scale = api.kronecker_quant(tensor_model_parallel_all_gather(x), *transform, activation_bits=activation_bits)
    return q.narrow(-1, layer.tp_rank * columns, columns).contiguous(), scale
