# SPDX-License-Identifier: Apache-2.0
"""The operators' arithmetic in plain torch: the oracle of every kernel's tests.

Written for clarity, independent of the native code. Weights stay unpacked, int8 [out, in]. Formulas:
`flatquant_linear`, `kronecker_quant` as msModelSlim's own fake-quantized model computes them; `*_npu` with the
roundings that CANN documents for aclnnFlatQuant (not compared with a device). How values that are not finite
propagate is part of the operators' contract (see `api`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

INT8_MAX = 127

SMALLEST_MAXIMUM = 2.0**-100
"""Of the fused NPU kernel: a token whose largest magnitude is below is divided by this instead."""


def kronecker_transform(x: Tensor, left_trans: Tensor | None, right_trans: Tensor | None) -> Tensor:
    """x @ kron(left_trans, right_trans) for x [..., in], as left_trans^T (X right_trans) with X [M, N] per token.

    Computed in x's dtype; a missing factor is the identity.
    """
    features = x.shape[-1]
    if left_trans is not None:
        left = left_trans.shape[0]
    else:
        left = features // right_trans.shape[0] if right_trans is not None else 1
    tokens = x.reshape(*x.shape[:-1], left, features // left)
    if right_trans is not None:
        tokens = tokens @ right_trans.to(x.dtype)
    if left_trans is not None:
        tokens = left_trans.to(x.dtype).T @ tokens
    return tokens.reshape(x.shape)


def quantize_tokens(
    x: Tensor, clip_ratio: float, q_min: int = INT4_MIN, q_max: int = INT4_MAX
) -> tuple[Tensor, Tensor]:
    """Symmetric per-token quantization: (q int8 in [q_min, q_max], scale float32 = clip_ratio * max|x| / q_max).

    A token with a NaN or an infinity has scale NaN and q 0. Where the scale is 0, q is 0.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    scale = torch.where(largest.isfinite(), clip_ratio * largest / q_max, torch.nan)
    # A token whose scale is 0 or NaN is not divided by it.
    q = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0)
    return q.round().clamp(q_min, q_max).to(torch.int8), scale


def kronecker_quant(
    x: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: float = 1.0,
    *,
    activation_bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Transform in float32, then quantize per token; see `vllm_w4a4_plugin.ops.kronecker_quant`."""
    q_range = (INT4_MIN, INT4_MAX) if activation_bits == 4 else (-INT8_MAX, INT8_MAX)
    return quantize_tokens(kronecker_transform(x.float(), left_trans, right_trans), clip_ratio, *q_range)


def int4_linear(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_offset: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = scale * sum_g weight_scale[g] * sum_{k in g} q[k] * (weight[k] - weight_offset[g]) + bias.

    The sums over k are exact integers (computed in float64, which holds them exactly); the rest is float32.
    """
    groups = 1 if weight_scale.dim() == 1 else weight_scale.shape[1]
    weight_scale = weight_scale.reshape(-1, groups).float()
    group_size = q.shape[-1] // groups
    grouped_q = q.double().reshape(*q.shape[:-1], groups, group_size)
    grouped_weight = weight.double().reshape(weight.shape[0], groups, group_size)
    products = torch.einsum("...gk,ogk->...og", grouped_q, grouped_weight).float()
    if weight_offset is not None:
        sums = grouped_q.sum(-1).float()
        products = products - weight_offset.reshape(-1, groups).float() * sums[..., None, :]
    y = scale[..., None] * (weight_scale * products).sum(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def flatquant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: float = 1.0,
    bias: Tensor | None = None,
    *,
    weight_offset: Tensor | None = None,
    activation_bits: int = 4,
) -> Tensor:
    """A W4A4 or W4A8 linear on an unpacked weight, int8 [out, in]; see `vllm_w4a4_plugin.ops.flatquant_linear`."""
    q, scale = kronecker_quant(x, left_trans, right_trans, clip_ratio, activation_bits=activation_bits)
    return int4_linear(q, scale, weight, weight_scale, bias, weight_offset, x.dtype)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    left_trans: Tensor | None = None,
    right_trans: Tensor | None = None,
    clip_ratio: float = 1.0,
) -> Tensor:
    """int8 weights [out, in] and activations; scale = clip_ratio * max|x'| / 127 per token, q in [-127, 127]."""
    q, scale = kronecker_quant(x, left_trans, right_trans, clip_ratio, activation_bits=8)
    return int8_linear(q, scale, weight, weight_scale, bias, None, x.dtype)


def int8_linear(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    quant_bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = scale * weight_scale * (q . weight + quant_bias) + bias, the sums exact (computed in float64)."""
    sums = q.double() @ weight.double().T
    if quant_bias is not None:
        sums = sums + quant_bias.double()
    y = scale[..., None] * (weight_scale.reshape(-1) * sums.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def rms_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, epsilon: float) -> Tensor:
    """s / sqrt(mean(s^2) + epsilon) * norm_weight in float32; s = x + residual takes the residual's place."""
    total = x.float() if residual is None else x.float() + residual.float()
    if residual is not None:
        residual.copy_(total)
    factor = 1 / (total.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return (total * factor * norm_weight.float()).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up in float32, for gate and up side by side."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_offset: Tensor | None = None,
) -> Tensor:
    """y = x ((weight - weight_offset) * weight_scale)^T + bias in float32, for an int8 weight [out, in]."""
    groups = 1 if weight_scale.dim() == 1 else weight_scale.shape[1]
    floats = weight.float().reshape(weight.shape[0], groups, -1)
    if weight_offset is not None:
        floats = floats - weight_offset.reshape(-1, groups, 1)
    floats = (floats * weight_scale.reshape(-1, groups, 1)).reshape(weight.shape)
    y = x.float() @ floats.T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def experts_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Callable[[Tensor, int], Tensor],
    down: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The routed experts of one layer, token by token; see `vllm_w4a4_plugin.ops.experts_mlp`.

    Args:
        x: [tokens, hidden].
        topk_weights: float32 [tokens, top_k].
        topk_ids: integers [tokens, top_k], negative for an expert that is not here.
        gate_up: (float32 [tokens, hidden], expert) -> float32 [tokens, 2 * intermediate], gate first.
        down: (float32 [tokens, intermediate], expert) -> float32 [tokens, hidden].
    """
    y = torch.zeros(x.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        if expert < 0:
            continue
        gate, up = gate_up(x[tokens].float(), expert).chunk(2, dim=-1)
        result = down(torch.nn.functional.silu(gate) * up, expert)
        y.index_add_(0, tokens, topk_weights[tokens, places][:, None] * result)
    return y.to(x.dtype)


def kronecker_quant_npu(
    x: Tensor, left_trans: Tensor, right_trans: Tensor, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`kronecker_quant` with the roundings of aclnnFlatQuant.

    x bfloat16 or float16: the first product is rounded to x's dtype, the second to float16 whatever x's dtype is;
    scale = max|z| * clip / 7 in float32; q = rint(float16(float32(z) * ((7 / clip) / max|z|))), saturated.

    By these formulas an infinity in z, also one from a value beyond float16, makes the scale infinite. What the maximum
    and the conversion to int4 make of NaN is not documented; here the scale becomes NaN and q 0.
    """
    left, right = left_trans.shape[0], right_trans.shape[0]
    tokens = x.reshape(*x.shape[:-1], left, right)
    y = (tokens.float() @ right_trans.to(x.dtype).float()).to(x.dtype)
    z = (left_trans.to(x.dtype).float().T @ y.float()).to(torch.float16).float().reshape(x.shape)
    largest = z.abs().amax(-1)
    scale = largest * clip_ratio / INT4_MAX
    factor = torch.where(largest > 0, (INT4_MAX / clip_ratio) / largest, 0.0)
    q = (z * factor[..., None]).to(torch.float16).float().nan_to_num(nan=0.0).round().clamp(INT4_MIN, INT4_MAX)
    return q.to(torch.int8), scale


def kronecker_quant_fused(
    x: Tensor, left_trans: Tensor | None, right_trans: Tensor | None, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`kronecker_quant` with the roundings of the project's fused NPU kernel (docs/design/npu-kernel.md).

    x bfloat16 or float16: X R is rounded to x's dtype if left_trans follows, everything else is float32;
    q = round_half_even(z * ((7 / clip) / max(max|z|, 2^-100))), saturated; scale = max|z| * (clip / 7).
    """
    z = kronecker_transform(x.float(), None, right_trans)
    if left_trans is not None:
        z = kronecker_transform(z.to(x.dtype).float(), left_trans, None)
    largest = z.abs().amax(-1)
    highest, clip = torch.tensor(float(INT4_MAX)), torch.tensor(clip_ratio)
    factor = highest / clip / largest.clamp(min=SMALLEST_MAXIMUM)
    q = (z * factor[..., None]).nan_to_num(nan=0.0).round().clamp(INT4_MIN, INT4_MAX).to(torch.int8)
    return q, largest * (clip / highest)


def unfused_quant_npu(
    x: Tensor, left_trans: Tensor | None, right_trans: Tensor | None, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`kronecker_quant` as two products, a clamp and npu_dynamic_quant compute it; q is in [-7, 7]."""
    return quantize_tokens(unfused_values_npu(x, left_trans, right_trans, clip_ratio), 1.0, -INT4_MAX)


def unfused_values_npu(
    x: Tensor, left_trans: Tensor | None, right_trans: Tensor | None, clip_ratio: float = 1.0
) -> Tensor:
    """What `unfused_quant_npu` quantizes: x' clamped to clip_ratio * max|x'|, in x's dtype after each operation."""
    z = kronecker_transform(x.float(), None, right_trans).to(x.dtype)
    z = kronecker_transform(z.float(), left_trans, None).to(x.dtype)
    bound = z.abs().amax(-1, keepdim=True) * torch.tensor(clip_ratio).to(x.dtype)
    return torch.minimum(torch.maximum(z, -bound), bound)


def flatquant_linear_npu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`flatquant_linear` as npu_kronecker_quant followed by npu_quant_matmul compute it.

    The outputs of a token that is not finite are NaN or infinite, none of them is finite.
    """
    q, scale = kronecker_quant_npu(x, left_trans, right_trans, clip_ratio)
    return int4_linear(q, scale, weight, weight_scale, bias, None, x.dtype)
