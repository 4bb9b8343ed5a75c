# SPDX-License-Identifier: Apache-2.0
"""A library in Python in place of csrc/npu's: the same operator, checked as torch_operator.cpp checks it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.ops.npu.nz import unpack_nz


@dataclass
class Faults:
    """What the library does wrongly.

    Attributes:
        swaps: exchanges the two int4 values of each byte of the weight.
        transposes: takes the left factor for its transpose.
        division: relative error of its division.
        raises: refuses to run.
    """

    swaps: bool = False
    transposes: bool = False
    division: float = 0.0
    raises: bool = False


@contextmanager
def fused_library() -> Iterator[Faults]:
    """Register the operator; the faults can be changed at any time."""
    faults = Faults()

    def flatquant_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        left_trans: torch.Tensor | None,
        right_trans: torch.Tensor | None,
        clip_ratio: float,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert x.is_contiguous()
        assert weight_scale.shape[0] == 1
        assert bias is None or bias.dtype == torch.float32
        assert all(factor is None or factor.dtype == x.dtype for factor in (left_trans, right_trans))
        if faults.raises:
            raise RuntimeError("aclrtLaunchKernel failed, error code 507015\nmore of the same")
        if faults.swaps:
            weight = (weight >> 4) | (weight << 4)
        if faults.transposes and left_trans is not None:
            left_trans = left_trans.t()
        unpacked = unpack_nz(weight, weight_scale.shape[1], x.shape[-1])
        q, scale = reference.kronecker_quant_fused(x, left_trans, right_trans, clip_ratio * (1 + faults.division))
        return reference.int4_linear(q, scale, unpacked, weight_scale[0], bias, None, x.dtype)

    def flatquant_linear_phases(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        left_trans: torch.Tensor | None,
        right_trans: torch.Tensor | None,
        clip_ratio: float,
        bias: torch.Tensor | None,
        phases: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert phases in (1, 3)
        if faults.transposes and left_trans is not None:
            left_trans = left_trans.t()
        y = flatquant_linear(x, weight, weight_scale, left_trans, right_trans, clip_ratio, bias)
        q, scale = reference.kronecker_quant_fused(x, left_trans, right_trans, clip_ratio)
        padded = torch.nn.functional.pad(q, (0, 64))  # rows have room for more
        data = (padded[:, 0::2] & 15) | (padded[:, 1::2] << 4)
        return y if phases == 3 else torch.zeros_like(y), data.view(torch.uint8), scale

    library = torch.library.Library("vllm_w4a4_npu", "FRAGMENT")
    library.define(
        "flatquant_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
        "float clip_ratio, Tensor? bias=None) -> Tensor"
    )
    library.impl("flatquant_linear", flatquant_linear, "CPU")
    library.define(
        "flatquant_linear_phases(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, "
        "Tensor? right_trans, float clip_ratio, Tensor? bias, int phases) -> (Tensor, Tensor, Tensor)"
    )
    library.impl("flatquant_linear_phases", flatquant_linear_phases, "CPU")
    try:
        yield faults
    finally:
        library._destroy()
