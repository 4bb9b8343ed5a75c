# SPDX-License-Identifier: Apache-2.0
"""The project's fused Ascend C library (csrc/npu), which is found, loaded and called here only.

It registers `torch.ops.vllm_w4a4_npu.flatquant_linear` on PrivateUse1 (csrc/npu/host/torch_operator.cpp): a W4A4 linear
in one launch, weights in nZ order (`nz`), the left factor as the checkpoint has it. Never run on an NPU.
"""

import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import LOGGER
from vllm_w4a4_plugin.ops.cpu import library_places

from .cann import DISPATCH_KEY, NAMESPACE, STALE_GRAPH, _library, clip_ratio
from .nz import nz_shape
from .select import INT4_PER_WORD

logger = logging.getLogger(LOGGER)

LIBRARY = "libvllm_w4a4_npu.so"
BYTES_PER_WORD = 4
# Takes a slot for the clip ratio, for the same reason as `cann.kronecker_quant`.
_library.define(
    "fused_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
    "int clip_slot, Tensor? bias) -> Tensor"
)


def library_file() -> Path | None:
    """Where the library is installed, None if it was not built."""
    return next((file for file in library_places(LIBRARY) if file.exists()), None)


@cache
def unavailable_reason() -> str:
    """Why the library is not used in this process, "" if it is loaded. Loads it on the first call."""
    if not envs.VLLM_W4A4_NPU_FUSED:
        return "VLLM_W4A4_NPU_FUSED=0"
    file = library_file()
    if file is None:
        return f"{LIBRARY} is not built"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        # Whoever built it will want to know. The layers run on CANN's operators instead.
        logger.warning("The fused NPU library %s cannot be loaded: %s", file, error)
        return f"{file} cannot be loaded: {error}"
    return ""


def fractals_shape(output_size: int, input_size: int) -> tuple[int, int, int, int]:
    """Shape of an arranged weight, int32. It differs from CANN's: a graph compiled for one form rejects the other."""
    *blocks, width = nz_shape(output_size, input_size)
    return (blocks[0], blocks[1], blocks[2], width // BYTES_PER_WORD)


def arrange_weight_(weight: Tensor) -> Tensor:
    """Rearrange a weight, int32 [out, in / 8] from `cann.pack_int4`, into nZ order in place.

    Returns:
        The same memory as int32 `fractals_shape(out, in)`.
    """
    outputs, words = weight.shape
    inputs, blocks, rows, width = nz_shape(outputs, words * INT4_PER_WORD)
    pairs = weight.view(torch.uint8).reshape(blocks, rows, inputs, width)
    weight.copy_(pairs.permute(2, 0, 1, 3).contiguous().view(torch.int32).view(weight.shape))
    return _as_fractals(weight)


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
        weight: from `arrange_weight_`. weight_scale: float32 [out].
        left_trans, right_trans: in x's dtype, as in the checkpoint (L, not L^T); None is the identity.
        clip_slot: from `cann.new_clip_slot`.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    return torch.ops.vllm_w4a4_npu.fused_linear(
        x, _as_fractals(weight), weight_scale, left_trans, right_trans, clip_slot, bias
    )


def quantize_and_multiply(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: float,
    bias: Tensor | None,
    phases: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's two phases in launches of their own, for the device check.

    Args:
        x: bfloat16 [tokens, in]; of the factors, both are there or none.
        weight, weight_scale, left_trans, right_trans, bias: as for `flatquant_linear`.
        clip_ratio: in (0, 1].
        phases: 1 transforms and quantizes, 3 multiplies too.

    Returns:
        (y [tokens, out], zeros unless it was multiplied; q int32 [tokens, in / 8]; scale float32 [tokens]).

    Raises:
        AttributeError: the library was built without them.
    """
    y, q, scale = torch.ops.vllm_w4a4_npu.flatquant_linear_phases(
        x.contiguous(),
        _as_fractals(weight).view(torch.uint8),
        weight_scale.view(1, -1),
        left_trans,
        right_trans,
        clip_ratio,
        bias.float() if bias is not None else None,
        phases,
    )
    # Rows of q are padded.
    return y, q[:, : x.shape[-1] // 2].contiguous().view(torch.int32), scale


def register_kernel(dispatch_key: str = DISPATCH_KEY) -> None:
    """Register the implementation for a device; importing this module does it for NPUs."""
    _library.impl("fused_linear", _fused_linear, dispatch_key)


def _as_fractals(weight: Tensor) -> Tensor:
    if weight.dim() == 4:
        return weight
    return weight.view(fractals_shape(weight.shape[0], weight.shape[1] * INT4_PER_WORD))


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_slot: int,
    bias: Tensor | None,
) -> Tensor:
    if weight.dim() != 4:
        raise RuntimeError(STALE_GRAPH)
    return torch.ops.vllm_w4a4_npu.flatquant_linear(
        x.contiguous(),
        weight.view(torch.uint8),
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
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


register_kernel()
