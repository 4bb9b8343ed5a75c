# SPDX-License-Identifier: Apache-2.0
"""One scale for a whole token, of which each rank of a row-parallel layer has a part."""

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin import envs

from .base import LayerShape

MAXIMUM_BYTES = 4
"""What each rank tells the others of a token: its largest magnitude, in float32."""

LOCAL_SCALES_REMARK = "each rank quantizes with a scale of its own (VLLM_W4A4_LOCAL_SCALES=1)"


def shares_maximum(shape: LayerShape) -> bool:
    """Whether the ranks of a layer without a transform tell each other the largest magnitude of their parts."""
    return shape.is_row_parallel and not envs.VLLM_W4A4_LOCAL_SCALES


def token_maximum(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each whole token, float32 [...], NaN if any rank's part has one.

    Args:
        x: this rank's part of the tokens, [..., input_size].
    """
    own = x.abs().amax(-1, keepdim=True).float()
    return tensor_model_parallel_all_gather(own).amax(-1)
