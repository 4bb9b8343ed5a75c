# SPDX-License-Identifier: Apache-2.0
"""Checks of a tensor's values. Each returns what is wrong, "" if nothing is.

They take torch tensors and use their methods only, so that nothing here imports torch.
"""

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

if TYPE_CHECKING:
    import torch

ValueCheck = Callable[["torch.Tensor"], str]


def int4(weight: "torch.Tensor") -> str:
    """int4 values, one in each int8."""
    low, high = (int(value) for value in weight.aminmax()) if weight.numel() else (0, 0)
    if low < INT4_MIN or high > INT4_MAX:
        return f"expected int4 values in [{INT4_MIN}, {INT4_MAX}], found values from {low} to {high}"
    return ""


def finite(tensor: "torch.Tensor") -> str:
    """Neither NaN nor infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    if all(isfinite(float(extreme)) for extreme in tensor.aminmax()):  # NaN comes through
        return ""
    bad = (~tensor.isfinite()).sum().item()
    return f"expected finite values, found {bad} of {tensor.numel()} that are not"


def zeros(offset: "torch.Tensor") -> str:
    """Offsets of a type whose kernels take symmetric weights only."""
    if not offset.numel() or not bool(offset.any()):
        return ""
    return "expected zeros, found other values: the kernels of this type need symmetric weights"


def scales(scale: "torch.Tensor") -> str:
    """Finite and not negative; a row of zeros may have scale 0."""
    if problem := finite(scale):
        return problem
    bad = (scale < 0).sum().item()
    return f"expected scales that are not negative, found {bad} of {scale.numel()} that are" if bad else ""


def positive(scale: "torch.Tensor") -> str:
    """One finite value greater than 0."""
    value = scale.item()
    return "" if 0.0 < value < float("inf") else f"expected a finite scale greater than 0, found {value}"


def deq_scales(scale: "torch.Tensor") -> str:
    """float32 scales, or int64 ones whose low half has the bits of the float32 value, as NPU operators take them."""
    if scale.is_floating_point():
        return scales(scale)
    # Bits below those of infinity, without the sign: the finite values from 0 on.
    bad = ((scale < 0) | (scale >= 0x7F800000)).sum().item()
    return (
        f"expected the bits of finite float32 scales that are not negative, found {bad} of {scale.numel()} others"
        if bad
        else ""
    )


def clip_ratio(clip: "torch.Tensor") -> str:
    """One value in (0, 1]."""
    value = clip.item()
    return "" if 0.0 < value <= 1.0 else f"expected a clip ratio in (0, 1], found {value}"
