# SPDX-License-Identifier: Apache-2.0
"""The project's fused Ascend C library: looked up, loaded and preferred here, and nowhere else.

The library registers `torch.ops.vllm_w4a4_npu.flatquant_linear` on PrivateUse1, with a fake implementation:

    flatquant_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans_t, Tensor? right_trans,
                     Tensor? clip_ratio, Tensor? bias) -> Tensor

with the arguments of `ops.flatquant_linear` in the forms of `ops.npu`, and

    pack_weight_(Tensor(a!) weight) -> ()

which turns a weight [out, in / 8] of `ops.npu.pack_int4` into the library's own order, in place. A library that keeps
that order does not define it.
"""

import os
from functools import cache

import torch
from torch import Tensor

from .cpu import library_places
from .npu import NAMESPACE

LIBRARY = "libvllm_w4a4_npu.so"
OPERATOR = f"{NAMESPACE}::flatquant_linear"
DISABLE_VARIABLE = "VLLM_W4A4_NPU_FUSED"
"""Set to 0, the library stays unused: to compare with the operators of CANN."""

ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 64
"""Sizes of a weight that the library's order stores without padding (one int4 fractal is 16 x 64)."""


@cache
def absence() -> str:
    """Why the library is not used in this process, "" if it is loaded. Loads it on the first call."""
    if os.environ.get(DISABLE_VARIABLE, "1") == "0":
        return f"{DISABLE_VARIABLE}=0"
    file = next((file for file in library_places(LIBRARY) if file.exists()), None)
    if file is None:
        return f"{LIBRARY} is not built"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{file} does not load: {error}"
    if not hasattr(torch.ops.vllm_w4a4_npu, "flatquant_linear"):
        return f"{file} does not define {OPERATOR}"
    return ""


def obstacle(rows: int, columns: int, groups: int, is_row_parallel: bool) -> str:
    """Why the library cannot compute a layer of this size on a rank, "" if it can; "" too where there is no library."""
    if absence():
        return ""
    if is_row_parallel:
        return "the tokens of a row-parallel layer are quantized before they are split over ranks"
    if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE or groups > 1:
        return f"weight [{rows}, {columns}] in {groups} groups, the fused kernel needs multiples of [16, 64] in one"
    return ""


def flatquant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans_t: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A W4A4 linear in one launch: x [..., in] -> [..., out] in x's dtype."""
    return torch.ops.vllm_w4a4_npu.flatquant_linear(
        x, weight, weight_scale, left_trans_t, right_trans, clip_ratio, bias
    )


def pack_weight_(weight: Tensor) -> None:
    """Bring a weight, int32 [out, in / 8], into the library's order in place."""
    if hasattr(torch.ops.vllm_w4a4_npu, "pack_weight_"):
        torch.ops.vllm_w4a4_npu.pack_weight_(weight)
