# SPDX-License-Identifier: Apache-2.0
"""Linears that begin with the step before them, on CPUs: a token is read once, normed or activated, and quantized.

A token that is not finite behaves as in `api`. Each operator gives the bits of the two operators that it stands for.
"""

import torch
from torch import Tensor

from .cpu import load_library


def rms_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in float32: s / sqrt(mean(s^2) + epsilon) * norm_weight with s = x + residual, rounded once.

    Args:
        x: float32, bfloat16 or float16 [..., features], contiguous.
        residual: like x, or None for zeros. It becomes s, rounded to its dtype.
        norm_weight: [features] in x's dtype.

    Returns:
        [..., features] in x's dtype.

    Raises:
        RuntimeError: an argument has a wrong dtype or shape; the message names it and says what was expected.
    """
    load_library()
    return torch.ops.vllm_w4a4.rms_norm.default(x, residual, norm_weight, epsilon)


def norm_flatquant_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    weight_packed: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: Tensor,
    bias: Tensor | None = None,
    *,
    weight_offset: Tensor | None = None,
    activation_bits: int = 4,
) -> Tensor:
    """`api.flatquant_linear` of `rms_norm`; the arguments and errors of both."""
    load_library()
    return torch.ops.vllm_w4a4.norm_flatquant_linear.default(
        x, residual, norm_weight, epsilon, weight_packed, weight_scale, left_trans, right_trans, clip_ratio, bias,
        weight_offset, activation_bits,
    )  # fmt: skip


def silu_flatquant_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: Tensor,
    bias: Tensor | None = None,
    *,
    weight_offset: Tensor | None = None,
    activation_bits: int = 4,
) -> Tensor:
    """`api.flatquant_linear` of `api.silu_and_mul`; the arguments and errors of both."""
    load_library()
    return torch.ops.vllm_w4a4.silu_flatquant_linear.default(
        x, weight_packed, weight_scale, left_trans, right_trans, clip_ratio, bias, weight_offset, activation_bits
    )
