# SPDX-License-Identifier: Apache-2.0
"""The operators that mixtures of experts call, on CPU tensors: documented checks, documented arithmetic.

Sources: the documents of aclnnGroupedMatmulV5 and aclnnMoeTokenUnpermute in CANN's ops-transformer, that of
aclnnTransQuantParam in ops-nn (which bits of a 64-bit scale count), those of the torch_npu functions, and for the dtype
of the scaled int4 product CANN's sources (MM_DTYPE_Y of GMM_A4W4 in grouped_matmul_utils.h). What no document defines,
as rows that belong to no expert, is NaN here.
"""

import torch
from torch import Tensor

from .operators import _HALVES, _check, _unpack

AXIS_LIMIT = 65536
GROUP_LIMIT = 1024
SCALE_BITS = 0xFFFFE000


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """aclnnGroupedMatmulV5 with one tensor each, groups along m: float, or int4 x int4 in int32."""

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnGroupedMatmulV5", problem)

    need(
        len(x) == len(weight) == 1 and group_type == 0 and split_item in (2, 3), "only one tensor each, groups of rows"
    )
    need(bias is None, "bias must be null for int4, and is not part of the stand-in for others")
    a, b = x[0], weight[0]
    need(a.dim() == 2 and b.dim() == 3, f"x is {list(a.shape)}, weight is {list(b.shape)}")
    need(a.is_contiguous() and b.is_contiguous(), "x and weight must not be transposed")
    need(
        group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1, "group_list must be int64"
    )
    need(group_list.shape[0] == b.shape[0] <= GROUP_LIMIT, f"{group_list.shape[0]} groups, {b.shape[0]} weights")
    need(group_list_type in (0, 1), f"group_list_type must be 0 or 1, got {group_list_type}")
    need(group_list_type == 0 or group_list.shape[0] > 1, "a list of numbers must not have length 1")
    ends = group_list.tolist() if group_list_type == 0 else group_list.cumsum(0).tolist()
    need(ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= a.shape[0], f"group_list {ends} for {a.shape[0]} rows")
    is_int4 = a.dtype == torch.int32
    if is_int4:
        a, b = _unpack(a), _unpack(b)  # [m, k], [experts, k, n]
    need(a.shape[1] == b.shape[1], f"x has {a.shape[1]} columns, weight has {b.shape[1]} rows")
    need(max(a.shape[1], b.shape[2]) < AXIS_LIMIT, f"last axes {a.shape[1]}, {b.shape[2]}")
    if is_int4:
        y = _int4_products(a, b, scale, per_token_scale, ends, output_dtype, need)
    else:
        need(a.dtype in _HALVES and b.dtype == a.dtype, f"x is {a.dtype}, weight is {b.dtype}")
        need(scale is None and per_token_scale is None and output_dtype in (None, a.dtype), "no scales for floats")
        y = _products(a, b, ends).to(a.dtype)
    return [y]


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, computed in float32."""
    first, second = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(first) * second).to(x.dtype)


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False
) -> Tensor:
    """Rows back at their tokens, weighted and added up in float32; sorted_indices [tokens * top_k]."""
    _check(sorted_indices.dtype == torch.int32, "aclnnMoeTokenUnpermute", f"sortedIndices is {sorted_indices.dtype}")
    _check(probs is not None and not padded_mode, "aclnnMoeTokenUnpermute", "the stand-in needs probs")
    _check(probs.dtype in (*_HALVES, torch.float32), "aclnnMoeTokenUnpermute", f"probs is {probs.dtype}")
    rows = permuted_tokens[sorted_indices.long()].float().reshape(*probs.shape, -1)
    return (rows * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


def moe_init_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    active_expert_range: list[int],
    quant_mode: int,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """npu_moe_init_routing_v2: tokens sorted by expert, those of experts outside the range left out.

    Returns (rows [tokens * top_k, hidden], place of each row by token and choice or -1, numbers of rows by expert, no
    scales).
    """

    def need(condition: bool, problem: str) -> None:
        _check(condition, "aclnnMoeInitRoutingV3", problem)

    first, end = active_expert_range
    need(quant_mode == -1 and scale is None, "the stand-in does not quantize")
    need(expert_tokens_num_type == 1 and expert_tokens_num_flag, "the stand-in counts rows")
    need(expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}")
    need(0 <= first < end <= expert_num and active_num == expert_idx.numel(), f"{first} to {end}, {active_num} rows")
    flat = expert_idx.flatten().long()
    order = torch.sort(flat, stable=True).indices
    order = order[(flat[order] >= first) & (flat[order] < end)]
    rows = torch.full((flat.numel(), x.shape[1]), float("nan"), dtype=x.dtype)
    rows[: order.numel()] = x[order // expert_idx.shape[1]]
    places = torch.full((flat.numel(),), -1, dtype=torch.int32)
    places[order] = torch.arange(order.numel(), dtype=torch.int32)
    counts = torch.bincount(flat, minlength=expert_num)[first:end]
    return rows, places, counts, x.new_empty(0, dtype=torch.float32)


def moe_gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of the softmax in x's dtype, as int32 numbers with weights that add up to 1 if `renorm`."""
    known = k_group == group_count == 1 and norm_type == 0 and bias_opt is None and routed_scaling_factor == 1.0
    _check(known, "aclnnMoeGatingTopK", "the stand-in has neither groups nor sigmoids nor biases")
    weights, ids = x.float().softmax(-1).topk(k)
    if renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), ids.to(torch.int32), x.new_empty(0)


def _products(a: Tensor, b: Tensor, ends: list[int]) -> Tensor:
    """float64 [m, n], NaN in rows of no group."""
    y = torch.full((a.shape[0], b.shape[2]), float("nan"), dtype=torch.float64)
    first = 0
    for group, end in enumerate(ends):
        y[first:end] = a[first:end].double() @ b[group].double()
        first = end
    return y


def _int4_products(a, b, scale, per_token_scale, ends, output_dtype, need) -> Tensor:  # type: ignore[no-untyped-def]
    experts, k, n = b.shape
    need(n % 8 == 0, f"weights that are not in NZ order need a multiple of 8 outputs, got {n}")
    need(output_dtype in _HALVES, f"output_dtype must be float16 or bfloat16, got {output_dtype}")
    need(scale is not None and len(scale) == 1 and scale[0].dtype == torch.int64, "scale must be one int64 tensor")
    words = scale[0] if scale[0].dim() == 3 else scale[0][:, None]
    parts = words.shape[1]
    need(words.shape == (experts, parts, n), f"scale is {list(scale[0].shape)}, not [{experts}, (groups,) {n}]")
    need(k % parts == 0 and (parts == 1 or k // parts % 2 == 0), f"{parts} scale groups of {k} inputs")
    need(bool((words >> 32 == 0).all()), "the upper 32 bits of a scale must be 0")
    need(per_token_scale is not None and per_token_scale[0].shape == (a.shape[0],), "per_token_scale must be [m]")
    need(per_token_scale[0].dtype == torch.float32, f"per_token_scale is {per_token_scale[0].dtype}")
    bits = words & SCALE_BITS
    scales = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    total = torch.zeros((a.shape[0], n), dtype=torch.float32)
    row_scales = torch.zeros((a.shape[0], parts, n), dtype=torch.float64)
    first = 0
    for group, end in enumerate(ends):
        row_scales[first:end] = scales[group].double()
        first = end
    for part in range(parts):
        columns = slice(part * k // parts, (part + 1) * k // parts)
        sums = _products(a[:, columns], b[:, columns], ends)
        total += (sums * row_scales[:, part]).to(torch.float16).float()
    return (total * per_token_scale[0][:, None]).to(output_dtype)


_library = torch.library.Library("_C_ascend", "FRAGMENT")
_library.define(
    "npu_moe_init_routing_custom(Tensor x, Tensor expert_idx, *, Tensor? scale=None, int active_num, int expert_num, "
    "int expert_tokens_num_type, bool expert_tokens_num_flag, int[2] active_expert_range, int quant_mode)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, int norm_type, "
    "bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None) -> (Tensor, Tensor, Tensor)"
)
_library.impl("moe_gating_top_k", moe_gating_top_k, "CPU")
_library.impl("npu_moe_init_routing_custom", moe_init_routing, "CPU")
