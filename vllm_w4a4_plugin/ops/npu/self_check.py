# SPDX-License-Identifier: Apache-2.0
"""The first time that a process would use a variant of an NPU kernel, one small linear tells whether it computes.

A kernel that is wrong or raises is not used, and the layer takes the next one. `vllm-w4a4 doctor --device-check` finds
out what is wrong. Two linears of at most 17 tokens cost a few launches and a transfer.
"""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_w4a4_plugin import envs

from . import cann
from .select import Kernel, KernelChoice, RankShape, select_kernel
from .trial import DeviceLinear, Operands, make_operands, output_bounds

SIZES, LEFT, RIGHT = (48, 192), 12, 16
TOKENS = (1, 17)
CLIP_RATIO = 0.5
"""Saturates many values, so that a kernel with another clip rule is found out."""


@dataclass(frozen=True)
class Variant:
    """What decides which code of a kernel runs.

    Attributes:
        kernel: one of ours.
        dtype: of the activations.
        has_left, has_right: whether the layer has these factors.
        has_bias: whether it has a bias.
    """

    kernel: Kernel
    dtype: torch.dtype
    has_left: bool = False
    has_right: bool = False
    has_bias: bool = False


def select_working_kernel(
    shape: RankShape, dtype: torch.dtype, has_bias: bool, device: torch.device, *, has_fused_library: bool
) -> KernelChoice:
    """`select_kernel` among the kernels that pass the self check on a device.

    Args:
        shape: of the layer on this rank.
        dtype: of its activations.
        has_bias: whether it has a bias.
        device: that computes it.
        has_fused_library: whether the fused library is loaded.
    """
    broken: dict[Kernel, str] = {}
    while True:
        choice = select_kernel(shape, has_fused_library=has_fused_library, broken=broken)
        if choice.kernel in (Kernel.NONE, Kernel.VLLM_ASCEND):
            return choice
        variant = Variant(choice.kernel, dtype, shape.left is not None, shape.right is not None, has_bias)
        fault = fault_of(variant, device)
        if not fault:
            return choice
        broken[choice.kernel] = fault


def fault_of(variant: Variant, device: torch.device) -> str:
    """What is wrong with a variant on a device, "" if nothing is or VLLM_W4A4_SELF_CHECK=0. Computes once a process.

    Nothing is computed on a device that the operators do not run on, as meta.
    """
    if not envs.VLLM_W4A4_SELF_CHECK or not cann.runs_on(device):
        return ""
    return _fault_of(variant, device)


def self_check_operands(variant: Variant, tokens: int) -> Operands:
    """The linear that a variant has to compute. Its factors, if any, are those of 192 = 12 x 16."""
    factors = (LEFT if variant.has_left else None, RIGHT if variant.has_right else None)
    has_transform = variant.has_left or variant.has_right
    clip_ratio = CLIP_RATIO if has_transform else 1.0
    return make_operands(
        tokens, SIZES, factors, variant.dtype, clip_ratio=clip_ratio, has_bias=variant.has_bias, seed=tokens
    )


@cache
def _fault_of(variant: Variant, device: torch.device) -> str:
    try:
        # Not `inference_mode`: parameters that are created later must not become inference tensors.
        with torch.no_grad(), torch.device("cpu"):
            return next((fault for tokens in TOKENS if (fault := _compare(variant, device, tokens))), "")
    except Exception as error:  # whatever torch_npu raises: the kernel is of no use then
        return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _compare(variant: Variant, device: torch.device, tokens: int) -> str:
    operands = self_check_operands(variant, tokens)
    y = DeviceLinear(variant.kernel, operands, device)(operands.x.to(device)).float().cpu()
    expected, tolerance, _ = output_bounds(variant.kernel, operands)
    wrong = ~((y - expected).abs() <= tolerance)
    return f"computes {int(wrong.sum())} of {wrong.numel()} outputs wrongly" if wrong.any() else ""
