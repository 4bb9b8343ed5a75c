# SPDX-License-Identifier: Apache-2.0
"""One scale for a whole token, of which each rank of a row-parallel layer has a part."""

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.ops import api

from .base import LayerShape

MAXIMUM_BYTES = 4
"""What each rank tells the others of a token: its largest magnitude, in float32."""

LOCAL_SCALES_REMARK = "each rank quantizes with a scale of its own (VLLM_W4A4_LOCAL_SCALES=1)"


def shares_maximum(shape: LayerShape) -> bool:
    """Whether the ranks of a layer without a transform, each with its input features, use the whole token's scale."""
    return shape.is_row_parallel and not envs.VLLM_W4A4_LOCAL_SCALES


def token_maximum(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each whole token, float32 [...], NaN if any rank's part has one.

    Args:
        x: this rank's part of the tokens, [..., input_size].
    """
    own = x.abs().amax(-1, keepdim=True).float()
    return tensor_model_parallel_all_gather(own).amax(-1)


def gather_quantized(x: torch.Tensor, activation_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole tokens, quantized without a transform by the ranks that have their parts.

    Args:
        x: this rank's part of the tokens, [..., input_size / ranks].
        activation_bits: 4 or 8.

    Returns:
        (q int8 [..., input_size], scale float32 [...]), on every rank those of `kronecker_quant` for the whole token.
    """
    q, scale = api.kronecker_quant(x, None, None, activation_bits=activation_bits, token_maximum=token_maximum(x))
    return gather_bytes(q).flatten(-2), scale


def gather_bytes(values: torch.Tensor) -> torch.Tensor:
    """What each rank has, int8 [..., ranks, count] of int8 [..., count].

    vLLM's exchange through shared memory copies floats only, and copies them bit by bit.
    """
    count = values.shape[-1]
    pairs = torch.nn.functional.pad(values, (0, count % 2)).view(torch.bfloat16)
    return tensor_model_parallel_all_gather(pairs).view(torch.int8).unflatten(-1, (-1, count + count % 2))[..., :count]
