# SPDX-License-Identifier: Apache-2.0
"""The operators' contracts on CPUs; `reference` has the same names for weights that are not packed.

Shapes: x is [..., in]; left_trans [M, M] and right_trans [N, N] with M * N == in; a missing factor is the identity,
both missing means no transform. q holds int4 values one per int8. Every tensor is contiguous.

Values that are not finite stay visible, for every dtype and instruction set:

- A NaN or an infinity in a token makes all outputs of that token NaN and changes no other token. So does a transform
  that takes finite values beyond float32. The token's scale is NaN and its q is 0.
- A NaN or an infinity in a transform factor makes every token NaN. In weight_scale, weight_offset or bias it changes
  its own output feature only: that becomes NaN or infinite, as the formula gives it.
- Finite values give what the formula gives in float32; outputs beyond the range of their dtype are infinite. Where a
  token's scale is 0 (zeros, or values so small that max|x'| / 7 rounds to 0), its q is 0 and its outputs are the bias.
"""

import torch
from torch import Tensor

from .cpu import load_library


def flatquant_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: Tensor | float = 1.0,
    bias: Tensor | None = None,
    *,
    weight_offset: Tensor | None = None,
    activation_bits: int = 4,
) -> Tensor:
    """Transform, quantize per token, multiply in integers, dequantize: a W4A4 or W4A8 linear in one call.

    Args:
        x: float32, bfloat16 or float16 [..., in].
        weight_packed: from `pack_int4`, int8 or uint8 `packed_int4_shape(out, in)`.
        weight_scale: float32 [out], or [out, groups] for equal groups of input features.
        left_trans, right_trans: float32 Kronecker factors or None.
        clip_ratio: in (0, 1]. Compiled graphs read the first element of a tensor at each run; a number is part of them.
        bias: [out], any float dtype, or None.
        weight_offset: float32, shaped like weight_scale, subtracted from the int4 weights; None for symmetric ones.
        activation_bits: 4 for q in [-8, 7] and scale clip_ratio * max|x'| / 7, or 8 for q in [-127, 127] and scale
            clip_ratio * max|x'| / 127.

    Returns:
        [..., out] in x's dtype.

    Raises:
        RuntimeError: an argument has a wrong dtype, shape or value; the message names it and says what was expected.
    """
    load_library()
    transform = (left_trans, right_trans, _as_tensor(clip_ratio))
    return torch.ops.vllm_w4a4.flatquant_linear.default(
        x, weight_packed, weight_scale, *transform, bias, weight_offset, activation_bits
    )


def kronecker_quant(
    x: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: Tensor | float = 1.0,
    *,
    activation_bits: int = 4,
    token_maximum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The activation half of `flatquant_linear`.

    Args:
        x, left_trans, right_trans, clip_ratio, activation_bits: as there.
        token_maximum: float32 [...], or None: where x has a part of each token, max|x'| of the whole one, whose scale
            the part then gets. One that is not finite makes the scale NaN.

    Returns:
        (q int8 [..., in], scale float32 [...]): x @ kron(left_trans, right_trans) is about q * scale.
        A token that is not finite has scale NaN and q 0.
    """
    load_library()
    clip = _as_tensor(clip_ratio)
    return torch.ops.vllm_w4a4.kronecker_quant.default(x, left_trans, right_trans, clip, activation_bits, token_maximum)


def int4_linear(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_offset: Tensor | None,
    out_dtype: torch.dtype,
    *,
    activation_bits: int = 4,
) -> Tensor:
    """The matrix half of `flatquant_linear`, on tokens from `kronecker_quant` with the same `activation_bits`.

    A scale that is NaN makes all outputs of its token NaN, whatever q holds.

    Returns:
        [..., out] of `out_dtype`.
    """
    load_library()
    return torch.ops.vllm_w4a4.int4_linear.default(
        q, scale, weight_packed, weight_scale, bias, weight_offset, out_dtype, activation_bits
    )


def int8_linear(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quant_bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = scale * weight_scale * (q . weight + quant_bias) + bias, for tokens that are quantized already.

    Args:
        q: int8 [..., in], any values.
        scale: float32 [...]; one that is NaN makes all outputs of its token NaN, whatever q holds.
        weight_packed: filled by `pack_int8_rows_`.
        weight_scale: float32 [out].
        bias: [out], any float dtype, or None.
        quant_bias: int32 [out] or None, added to the integer sums. The sums are modulo 2^32, as on NPUs.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., out] of `out_dtype`.
    """
    load_library()
    return torch.ops.vllm_w4a4.int8_linear.default(q, scale, weight_packed, weight_scale, bias, quant_bias, out_dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up in float32. What is not finite stays not finite.

    Args:
        x: float32, bfloat16 or float16 [..., 2 * features], contiguous: gate, then up. The result has its dtype.
    """
    load_library()
    return torch.ops.vllm_w4a4.silu_and_mul.default(x)


def weight_only_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_offset: Tensor | None = None,
) -> Tensor:
    """y = x ((weight - weight_offset) * weight_scale)^T + bias in float32, for W8A16 and W4A16.

    A NaN in a token makes all outputs of the token NaN; an infinity makes each of them NaN or infinite. Other tokens do
    not change.

    Args:
        x: float32, bfloat16 or float16 [..., in].
        weight_packed: from `pack_int4`, or filled by `pack_int8_rows_`; the shape tells which.
        weight_scale: float32 [out], or [out, groups] for equal groups of input features.
        bias: [out], any float dtype, or None.
        weight_offset: float32, shaped like weight_scale, or None.

    Returns:
        [..., out] in x's dtype.
    """
    load_library()
    return torch.ops.vllm_w4a4.weight_only_linear.default(x, weight_packed, weight_scale, bias, weight_offset)


def w8a8_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    left_trans: Tensor | None = None,
    right_trans: Tensor | None = None,
    clip_ratio: Tensor | float = 1.0,
) -> Tensor:
    """int8 weights and int8 activations in one call, with exact integer sums; without a transform, W8A8_DYNAMIC.

    Args:
        x: float32, bfloat16 or float16 [..., in]; transformed to x' as by `flatquant_linear`, then quantized per token
            with scale clip_ratio * max|x'| / 127, q in [-127, 127].
        weight_packed: filled by `pack_int8_rows_`, int8 `packed_int8_shape(out, in)`.
        weight_scale: float32 [out].
        bias: [out], any float dtype, or None.
        left_trans, right_trans, clip_ratio: as for `flatquant_linear`.

    Returns:
        [..., out] in x's dtype.
    """
    load_library()
    return torch.ops.vllm_w4a4.w8a8_linear.default(
        x, weight_packed, weight_scale, bias, left_trans, right_trans, _as_tensor(clip_ratio)
    )


def experts_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13_packed: Tensor,
    w13_scale: Tensor,
    w2_packed: Tensor,
    w2_scale: Tensor,
    *,
    w13_offset: Tensor | None = None,
    w2_offset: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    w13_left_trans: Tensor | None = None,
    w13_right_trans: Tensor | None = None,
    w13_clip_ratio: Tensor | float = 1.0,
    w2_left_trans: Tensor | None = None,
    w2_right_trans: Tensor | None = None,
    w2_clip_ratio: Tensor | float = 1.0,
    expert_map: Tensor | None = None,
    activation_bits: int = 4,
    is_double: bool = False,
) -> Tensor:
    """The routed experts of one layer: y = sum_j topk_weights[j] * down_j(silu(gate_j(x)) * up_j(x)), j over the top k.

    Each product quantizes its tokens as `flatquant_linear` does (int4 weights) or as `w8a8_linear` does (int8 weights);
    a token's x is quantized once for all its experts. Everything between the integer products is float32, also for
    other dtypes of x; the sum over j is float64.

    Args:
        x: float32, bfloat16 or float16 [tokens, hidden].
        topk_weights: float32 [tokens, top_k].
        topk_ids: int32 or int64 [tokens, top_k]; -1 is an expert that does not count.
        w13_packed: the packed rows of gate, then those of up, of each expert: int8 or uint8 [experts,
            *packed_int4_shape(2 * intermediate, hidden)], or packed_int8_shape for int8 weights.
        w13_scale: float32 [experts, 2 * intermediate], or [experts, 2 * intermediate, groups].
        w2_packed, w2_scale: the same of down, [experts, ...] for hidden x intermediate.
        w13_offset, w2_offset: float32, shaped like the scales; None for symmetric weights.
        w13_bias, w2_bias: float32 [experts, out], or None.
        w13_left_trans, w13_right_trans: float32 Kronecker factors of x, or None.
        w13_clip_ratio: in (0, 1], one for all experts.
        w2_left_trans, w2_right_trans: factors of the intermediate activations, [size, size] for all experts or
            [experts, size, size], or None.
        w2_clip_ratio: in (0, 1], one for all experts or [experts].
        expert_map: int32, place of each expert of `topk_ids` among those here, -1 for one of another rank; None if all
            are here.
        activation_bits: as for `flatquant_linear`, for int4 weights; int8 ones have 8.
        is_double: whether y is float64, for sums over ranks that round as one rank does, instead of x's dtype.

    Returns:
        [tokens, hidden], without what the experts of other ranks add. A token without an expert here is 0.

    Raises:
        RuntimeError: an argument has a wrong dtype, shape or value; the message names it and says what was expected.
    """
    load_library()
    return torch.ops.vllm_w4a4.experts_mlp.default(
        x,
        topk_weights,
        topk_ids,
        w13_packed,
        w13_scale,
        w2_packed,
        w2_scale,
        w13_offset,
        w2_offset,
        w13_bias,
        w2_bias,
        w13_left_trans,
        w13_right_trans,
        _as_tensor(w13_clip_ratio),
        w2_left_trans,
        w2_right_trans,
        _as_tensor(w2_clip_ratio),
        expert_map,
        activation_bits,
        is_double,
    )


def _as_tensor(clip_ratio: Tensor | float) -> Tensor:
    return clip_ratio if isinstance(clip_ratio, Tensor) else torch.tensor([clip_ratio], dtype=torch.float32)
