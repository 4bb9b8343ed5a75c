# SPDX-License-Identifier: Apache-2.0
"""The operators that W4A4 and W8A8 linears call, on CPU tensors: documented checks, documented arithmetic.

Sources: the documents of aclnnFlatQuant, aclnnQuantMatmulV4, aclnnDynamicQuant and aclnnConvertWeightToINT4Pack in
CANN's ops-nn, and those of the torch_npu functions that call them, for Atlas A2 and A3. Written apart from
`vllm_w4a4_plugin.ops.reference`, which is the tests' oracle: products are accumulated in float64 here.
"""

import torch
from torch import Tensor

KRONECKER_FACTOR_LIMIT = 256
kronecker_token_limit = 262144
"""Tokens per call, in CANN 8.5 to 9.1. Tests change it."""

MATMUL_AXIS_LIMIT = 65535
_HALVES = (torch.float16, torch.bfloat16)


def _check(condition: bool, operator: str, problem: str) -> None:
    if not condition:
        raise RuntimeError(f"call {operator} failed: {problem}")


def npu_kronecker_quant(
    x: Tensor,
    kronecker_p1: Tensor,
    kronecker_p2: Tensor,
    clip_ratio: float | None = None,
    dst_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """aclnnFlatQuant with int4 output: x [T, M, N] -> (int32 [T, M, N / 8], float32 [T])."""

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnFlatQuant", problem)

    need(x.dim() == 3 and x.numel() > 0, f"x must have three dimensions and not be empty, got {list(x.shape)}")
    tokens, m, n = x.shape
    need(x.dtype in _HALVES, f"x must be float16 or bfloat16, got {x.dtype}")
    need(kronecker_p1.dtype == x.dtype and kronecker_p2.dtype == x.dtype, "x, P1 and P2 differ in dtype")
    need(tokens <= kronecker_token_limit, f"dimension 0 of x is {tokens}, at most {kronecker_token_limit}")
    need(max(m, n) <= KRONECKER_FACTOR_LIMIT, f"[{m}, {n}] exceeds {KRONECKER_FACTOR_LIMIT}")
    need(n % 8 == 0, f"the last dimension must be a multiple of 8 for int32 output, got {n}")
    need(kronecker_p1.shape == (m, m), f"P1 must be [{m}, {m}], got {list(kronecker_p1.shape)}")
    need(kronecker_p2.shape == (n, n), f"P2 must be [{n}, {n}], got {list(kronecker_p2.shape)}")
    clip = 1.0 if clip_ratio is None else clip_ratio
    need(type(clip) is float, f"clip_ratio must be a number, got {type(clip).__name__}")
    need(0.0 < clip <= 1.0, f"clip_ratio must be in (0, 1], got {clip}")
    need(dst_dtype in (None, torch.int32), f"dst_dtype must be int32, got {dst_dtype}")

    first = torch.einsum("tmn,nk->tmk", x.double(), kronecker_p2.double()).to(x.dtype)
    z = torch.einsum("lm,tmk->tlk", kronecker_p1.double(), first.double()).to(torch.float16).reshape(tokens, m * n)
    largest = z.abs().max(dim=1).values.float()
    scale = largest * clip / 7
    values = (z.float() * ((7 / clip) / largest)[:, None]).to(torch.float16)
    # What an all-zero token becomes is not documented (0 * inf): its scale is zero, so it must not matter.
    q = values.round().nan_to_num(nan=-8.0).clamp(-8, 7).to(torch.int32)
    return _pack(q).reshape(tokens, m, n // 8), scale


def npu_dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """aclnnDynamicQuant, symmetric per token, to int8 or (quint4x2) to int4 in int32."""

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnDynamicQuant", problem)

    need(smooth_scales is None and group_index is None, "the stand-in has no smooth_scales and no group_index")
    need(x.dim() >= 2 and x.numel() > 0, f"x must have more than one dimension, got {list(x.shape)}")
    need(x.dtype in _HALVES, f"x must be float16 or bfloat16, got {x.dtype}")
    need(dst_type in (None, torch.int8, torch.quint4x2), f"dst_type must be int8 or quint4x2, got {dst_type}")
    is_int4 = dst_type == torch.quint4x2
    need(not is_int4 or x.shape[-1] % 8 == 0, f"int4 needs a last dimension that is a multiple of 8, got {x.shape[-1]}")
    largest = 7 if is_int4 else 127
    scale = x.float().abs().amax(-1) / largest
    q = (x.float() / scale[..., None]).nan_to_num(nan=0.0).round().clamp(-largest - 1, largest)
    return (_pack(q.to(torch.int32)) if is_int4 else q.to(torch.int8)), scale


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """aclnnConvertWeightToINT4Pack: int32 [a, b] of int4 values -> int32 [a, b / 8], the first value lowest."""

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnConvertWeightToINT4Pack", problem)

    need(weight.dtype == torch.int32, f"weight must be int32, got {weight.dtype}")
    need(weight.dim() == 2 and weight.numel() > 0, f"weight must have two dimensions, got {list(weight.shape)}")
    need(weight.is_contiguous(), "weight must be contiguous")
    need(weight.shape[1] % 8 == 0, f"the last dimension must be a multiple of 8, got {weight.shape[1]}")
    need(int(weight.min()) >= -8 and int(weight.max()) <= 7, "values must be in [-8, 7]")
    return _pack(weight)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """aclnnQuantMatmul with a per-channel and a per-token scale: int8, or int4 in int32.

    The combinations without `pertoken_scale` are not part of the stand-in.
    """

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnQuantMatmul", problem)

    need(offset is None and pertoken_scale is not None, "the stand-in needs pertoken_scale and takes no offset")
    need(x1.dtype == x2.dtype, f"x1 is {x1.dtype}, x2 is {x2.dtype}")
    need(x1.dtype in (torch.int8, torch.int32), f"x1 must be int8 or int32, got {x1.dtype}")
    need(2 <= x1.dim() <= 6 and x2.dim() == 2, f"x1 is {list(x1.shape)}, x2 is {list(x2.shape)}")
    need(x1.is_contiguous(), "x1 must be contiguous")
    if x1.dtype == torch.int32:
        a = _unpack(x1)
        if x2.is_contiguous():
            b = _unpack(x2)  # [k, n / 8]
        else:
            need(x2.t().is_contiguous(), "x2 must be contiguous or the transpose of a contiguous matrix")
            b = _unpack(x2.t()).t()  # [n, k / 8], transposed
        axes = (a.shape[-1], b.shape[0] if not x2.is_contiguous() else b.shape[1])
        need(max(axes) <= MATMUL_AXIS_LIMIT, f"last axes {axes} exceed {MATMUL_AXIS_LIMIT}")
    else:
        a, b = x1, x2
    need(a.shape[-1] == b.shape[0], f"x1 has {a.shape[-1]} columns, x2 has {b.shape[0]} rows")
    n = b.shape[1]
    need(output_dtype in _HALVES, f"output_dtype must be float16 or bfloat16 here, got {output_dtype}")
    scales = (torch.float32, torch.bfloat16) if output_dtype == torch.bfloat16 else (torch.float32,)
    need(scale.dtype in scales and scale.dim() == 1 and scale.shape[0] in (1, n), f"scale: {scale.dtype} {scale.shape}")
    rows = a.numel() // a.shape[-1]
    need(
        pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == (rows,),
        f"pertoken_scale must be float32 [{rows}], got {pertoken_scale.dtype} {list(pertoken_scale.shape)}",
    )
    if bias is not None:
        biases = (torch.int32, torch.float32, output_dtype)
        need(bias.dtype in biases and bias.shape == (n,), f"bias: {bias.dtype} {list(bias.shape)}")
    # The sums are integers below 2**53, so float64 holds them exactly; the device has them in int32.
    sums = (a.reshape(rows, -1).double() @ b.double()).round()
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    y = sums.float() * scale.float() * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    return y.to(output_dtype).reshape(*x1.shape[:-1], n)


def npu_format_cast(x: Tensor, format: int) -> Tensor:
    """Layouts do not exist here; values stay as they are."""
    return x


def _pack(values: Tensor) -> Tensor:
    """int32 [..., 8 k] of int4 values -> int32 [..., k], element 0 in the low nibble."""
    shifts = torch.arange(8, dtype=torch.int64) * 4
    nibbles = (values.long() & 15).unflatten(-1, (-1, 8)) << shifts
    word = nibbles.sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    shifts = torch.arange(8, dtype=torch.int32) * 4
    nibbles = (words[..., None] >> shifts) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)
