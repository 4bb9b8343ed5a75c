# SPDX-License-Identifier: Apache-2.0
"""The project's fused Ascend C library (csrc/npu): looked up, loaded and called here, and nowhere else.

It registers `torch.ops.vllm_w4a4_npu.flatquant_linear` on PrivateUse1 (csrc/npu/host/torch_operator.cpp): a W4A4 linear
in one launch, weights in nZ order (`ops.nz`), the left factor as the checkpoint has it. Not run on an NPU.
"""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from vllm_w4a4_plugin.npu_limits import KRONECKER_FACTOR_LIMIT, KRONECKER_RIGHT_MULTIPLE

from .cpu import library_places
from .npu import DISPATCH_KEY, NAMESPACE, _library, clip_ratio
from .nz import FRACTAL_INPUTS, FRACTAL_OUTPUTS, nz_shape

logger = logging.getLogger("vllm.plugins.w4a4")

LIBRARY = "libvllm_w4a4_npu.so"
OPERATOR = f"{NAMESPACE}::flatquant_linear"
SWITCH = "VLLM_W4A4_NPU_FUSED"
"""Environment variable: set to 0, the library stays unused, to compare with the operators of CANN."""

IN_FEATURES_LIMIT, OUT_FEATURES_LIMIT = 32768, 65536
"""As in csrc/npu/host/tiling.cpp."""

# Takes a slot for the clip ratio, as `npu.kronecker_quant` does and for the same reason.
_library.define(
    "fused_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
    "int clip_slot, Tensor? bias) -> Tensor"
)


@cache
def absence() -> str:
    """Why the library is not used in this process, "" if it is loaded. Loads it on the first call."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    file = next((file for file in library_places(LIBRARY) if file.exists()), None)
    if file is None:
        return f"{LIBRARY} is not built"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        # Somebody built it and will want to know; the layers run by CANN's operators.
        logger.warning("The fused NPU library %s does not load: %s", file, error)
        return f"{file} does not load: {error}"
    return ""


def obstacle(rows: int, columns: int, left: int | None, right: int | None, is_row_parallel: bool) -> str:
    """Why the library cannot compute a layer of this size on a rank, "" if it can.

    Args:
        rows, columns: of the weight. Only sizes that the nZ order stores without padding are taken here, so that a
            weight is rearranged in place and can be loaded again.
        left, right: sizes of the factors, None where one is missing.
        is_row_parallel: whether the tokens are quantized before they are split over ranks.
    """
    if is_row_parallel:
        return "fused kernel: tokens of a row-parallel layer are quantized before they are split"
    if rows % FRACTAL_OUTPUTS or columns % FRACTAL_INPUTS:
        return f"fused kernel: weight {rows} x {columns} is not made of {FRACTAL_OUTPUTS} x {FRACTAL_INPUTS} fractals"
    if rows > OUT_FEATURES_LIMIT or columns > IN_FEATURES_LIMIT:
        return f"fused kernel: weight {rows} x {columns}, at most {OUT_FEATURES_LIMIT} x {IN_FEATURES_LIMIT}"
    if left is not None or right is not None:
        m = left or columns // (right or columns)
        n = columns // m
        if not (2 <= m <= KRONECKER_FACTOR_LIMIT and n <= KRONECKER_FACTOR_LIMIT and n % KRONECKER_RIGHT_MULTIPLE == 0):
            return f"fused kernel: transform {m} x {n}, at most 256 x 256 and 8 dividing the second"
    return ""


def arrange_weight_(weight: Tensor) -> None:
    """Bring a weight, int32 [out, in / 8] of `npu.pack_int4`, into nZ order in place."""
    inputs, outputs, rows, width = _nz_shape_of(weight)
    pairs = weight.view(torch.uint8).reshape(outputs, rows, inputs, width)
    weight.copy_(pairs.permute(2, 0, 1, 3).contiguous().view(torch.int32).view(weight.shape))


def flatquant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_slot: int,
    bias: Tensor | None,
) -> Tensor:
    """A W4A4 linear in one launch.

    Args:
        x: bfloat16 or float16 [..., in].
        weight: int32 [out, in / 8] of `arrange_weight_`. weight_scale: float32 [out].
        left_trans, right_trans: in x's dtype, as in the checkpoint (L, not L^T); None is the identity.
        clip_slot: from `npu.new_clip_slot`.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    return torch.ops.vllm_w4a4_npu.fused_linear(x, weight, weight_scale, left_trans, right_trans, clip_slot, bias)


def register_kernel(dispatch_key: str = DISPATCH_KEY) -> None:
    """Register the implementation for a device; importing this module does it for NPUs."""
    _library.impl("fused_linear", _fused_linear, dispatch_key)


def _nz_shape_of(weight: Tensor) -> tuple[int, int, int, int]:
    return nz_shape(weight.shape[0], weight.shape[1] * 8)


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_slot: int,
    bias: Tensor | None,
) -> Tensor:
    return torch.ops.vllm_w4a4_npu.flatquant_linear(
        x.contiguous(),
        weight.view(torch.uint8).view(_nz_shape_of(weight)),
        weight_scale.view(1, -1),
        left_trans,
        right_trans,
        clip_ratio(clip_slot),
        bias.float() if bias is not None else None,
    )


@torch.library.register_fake(f"{NAMESPACE}::fused_linear")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_slot: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register_kernel()
