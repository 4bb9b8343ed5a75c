# SPDX-License-Identifier: Apache-2.0
"""Values for `--load-format dummy`, with which a model computes numbers of ordinary size at the usual speed.

vLLM fills every parameter with tiny random numbers, which are no clip ratio, no transform and, for integers, all zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint.types import (
    BIAS,
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)

TYPICAL_SCALE = 0.01


def fill_with_plausible_values(layer: torch.nn.Module) -> None:
    """Fill the parameters of a quantized layer, or of a layer of experts (`w13_weight`, ...), in place."""
    for name, parameter in layer.named_parameters(recurse=False):
        suffix = name.removeprefix("w13_").removeprefix("w2_")
        if suffix in _VALUES:
            _VALUES[suffix](parameter.data)


def _random_codes(data: Tensor) -> None:
    limits = torch.iinfo(data.dtype)
    data.random_(limits.min, limits.max, generator=torch.Generator(data.device).manual_seed(0))


def _identity(data: Tensor) -> None:
    data.copy_(torch.eye(data.shape[-1], dtype=data.dtype))  # of each expert, where there are several


_VALUES: dict[str, Callable[[Tensor], object]] = {
    WEIGHT: _random_codes,
    WEIGHT_SCALE: lambda data: data.fill_(TYPICAL_SCALE),
    WEIGHT_OFFSET: Tensor.zero_,
    LEFT_TRANS: _identity,
    RIGHT_TRANS: _identity,
    BIAS: Tensor.zero_,
    CLIP_RATIO: lambda data: data.fill_(1.0),
}
