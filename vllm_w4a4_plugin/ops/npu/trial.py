# SPDX-License-Identifier: Apache-2.0
"""One made-up linear layer on one NPU kernel, and what the reference expects of it.

The self check at start-up and `vllm-w4a4 doctor --device-check` compare the two. Activations and factors are small
integers, so sums are exact in float32 in any order, and only the documented roundings remain.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN
from vllm_w4a4_plugin.ops import reference

from . import cann, fused
from .select import INT4_PER_WORD, Kernel

DISTINCT_ROWS = 1021
"""Rows of a weight after which they repeat. A prime, so that no tile of the kernels repeats; the reference then needs
to compute only this many outputs."""

DIVISION_ERROR = 2.0**-21
"""Relative error that is allowed between max|z| and the factor and scale that follow from it. How `Div` rounds on A2
is not specified; two divisions and two products with one unit in the last place each stay below."""


@dataclass(frozen=True)
class Operands:
    """A linear layer on the CPU.

    Attributes:
        x: bfloat16 or float16 [tokens, in].
        weight: int8 [rows, in]; output o of the layer uses row o % rows.
        weight_scale: float32 [out].
        left_trans, right_trans: float32 factors as in the checkpoint, None where the layer has none.
        clip_ratio: in (0, 1].
        bias: float32 [out] or None.
    """

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    left_trans: Tensor | None
    right_trans: Tensor | None
    clip_ratio: float
    bias: Tensor | None

    @property
    def whole_weight(self) -> Tensor:
        """int8 [out, in]."""
        outputs, rows = self.weight_scale.shape[0], self.weight.shape[0]
        return self.weight.repeat(-(-outputs // rows), 1)[:outputs]


@dataclass(frozen=True)
class Interval:
    """What a kernel may compute for `Operands`.

    Attributes:
        q: int8 [tokens, in] by the reference; low, high: the same if the division errs by `DIVISION_ERROR`. They differ
            at ties only.
        scale: float32 [tokens].
    """

    q: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor


def make_operands(
    tokens: int,
    sizes: tuple[int, int],
    factors: tuple[int | None, int | None],
    dtype: torch.dtype,
    *,
    clip_ratio: float = 1.0,
    has_bias: bool = False,
    seed: int = 0,
) -> Operands:
    """A random layer of (output_size, input_size) `sizes` with (left, right) factors of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    output_size, input_size = sizes

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def factor(size: int | None) -> Tensor | None:
        return None if size is None else integers(-2, 2, size, size).float()

    rows = min(output_size, DISTINCT_ROWS)
    return Operands(
        x=integers(-9, 9, tokens, input_size).to(dtype),
        weight=integers(INT4_MIN, INT4_MAX, rows, input_size).to(torch.int8),
        weight_scale=torch.rand(output_size, generator=generator, dtype=torch.float32) * 0.02 + 1e-3,
        left_trans=factor(factors[0]),
        right_trans=factor(factors[1]),
        clip_ratio=clip_ratio,
        bias=torch.randn(output_size, generator=generator, dtype=torch.float32) * 100 if has_bias else None,
    )


class DeviceLinear:
    """`Operands` on a device, in the forms that one kernel takes.

    Args:
        kernel: FUSED, KRONECKER, UNFUSED or UNTRANSFORMED.
        operands: of the layer; its x is not used.
        device: that computes.
    """

    def __init__(self, kernel: Kernel, operands: Operands, device: torch.device) -> None:
        self.kernel, self.device, self.dtype = kernel, device, operands.x.dtype
        self.weight = cann.pack_int4(operands.whole_weight, device)
        if kernel is Kernel.FUSED:
            fused.arrange_weight_(self.weight)
        self.weight_scale = operands.weight_scale.to(device)
        left, right = operands.left_trans, operands.right_trans
        if left is not None and kernel is not Kernel.FUSED:
            left = left.t()
        self.left = None if left is None else left.to(device, self.dtype).contiguous()
        self.right = None if right is None else right.to(device, self.dtype)
        self.bias = None if operands.bias is None else operands.bias.to(device)
        self.clip_ratio = torch.tensor([operands.clip_ratio], dtype=torch.float32, device=device)
        self.clip_slot = cann.new_clip_slot()
        cann.set_clip_ratio(self.clip_slot, operands.clip_ratio)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q int32 [tokens, in / 8], scale) of x on the device; not for FUSED."""
        if self.kernel is Kernel.KRONECKER:
            assert self.left is not None
            assert self.right is not None
            return cann.kronecker_quant(x, self.left, self.right, self.clip_slot)
        return cann.unfused_quant(x, self.left, self.right, self.clip_ratio)

    def multiply(self, q: Tensor, scale: Tensor) -> Tensor:
        """The layer's output for quantized tokens; not for FUSED."""
        return cann.int4_linear(q, scale, self.weight, self.weight_scale, self.bias, self.dtype)

    def in_two_launches(self, x: Tensor, phases: int) -> tuple[Tensor, Tensor, Tensor]:
        """(y, q int32 [tokens, in / 8], scale) of x; phases 1 or 3 as `fused.quantize_and_multiply`. FUSED only."""
        clip_ratio = cann.clip_ratio(self.clip_slot)
        assert clip_ratio is not None
        return fused.quantize_and_multiply(
            x, self.weight, self.weight_scale, self.left, self.right, clip_ratio, self.bias, phases
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output [tokens, out] for x [tokens, in], both on the device."""
        if self.kernel is not Kernel.FUSED:
            return self.multiply(*self.quantize(x))
        return fused.flatquant_linear(
            x, self.weight, self.weight_scale, self.left, self.right, self.clip_slot, self.bias
        )


def quantize(kernel: Kernel, operands: Operands, clip_ratio: float | None = None) -> tuple[Tensor, Tensor]:
    """(q, scale) as the reference computes them with the roundings of a kernel."""
    x, left, right = operands.x, operands.left_trans, operands.right_trans
    clip = operands.clip_ratio if clip_ratio is None else clip_ratio
    if kernel is Kernel.FUSED:
        return reference.kronecker_quant_fused(x, left, right, clip)
    if kernel is Kernel.KRONECKER:
        assert left is not None
        assert right is not None
        return reference.kronecker_quant_npu(x, left, right, clip)
    return reference.unfused_quant_npu(x, left, right, clip)


def expected_quantization(kernel: Kernel, operands: Operands) -> Interval:
    """q and scale of the reference, and how far q may move if the kernel's division errs."""
    q, scale = quantize(kernel, operands)
    # A factor that is larger or smaller by a relative error is that of a clip ratio that is smaller or larger by it.
    shrunk, grown = (quantize_nudged(kernel, operands, sign * DIVISION_ERROR) for sign in (-1, 1))
    values = torch.stack((q, shrunk, grown))
    return Interval(q, values.amin(0), values.amax(0), scale)


def quantize_nudged(kernel: Kernel, operands: Operands, error: float) -> Tensor:
    """q of the reference if the division had this relative error."""
    if kernel in (Kernel.FUSED, Kernel.KRONECKER):
        return quantize(kernel, operands, operands.clip_ratio * (1 + error))[0]
    z = reference.unfused_values_npu(operands.x, operands.left_trans, operands.right_trans, operands.clip_ratio)
    return reference.quantize_tokens(z, 1 + error, -INT4_MAX)[0]


def expected_output(q: Tensor, scale: Tensor, operands: Operands) -> Tensor:
    """float32 [tokens, out] of the reference for these int4 values and scales."""
    rows, outputs = operands.weight.shape[0], operands.weight_scale.shape[0]
    sums = reference.int4_linear(q, torch.ones_like(scale), operands.weight, torch.ones(rows, dtype=torch.float32))
    y = sums.repeat(1, -(-outputs // rows))[:, :outputs] * operands.weight_scale * scale[:, None]
    return y if operands.bias is None else y + operands.bias


def output_bounds(kernel: Kernel, operands: Operands) -> tuple[Tensor, Tensor, int]:
    """(expected, tolerance, possible ties) of a whole layer: float32 [tokens, out] twice, and a number of int4 values.

    At a tie, q may be either of two values, and the scale may err by `DIVISION_ERROR`.
    """
    found = expected_quantization(kernel, operands)
    expected = expected_output(found.q, found.scale, operands)
    ties = (found.low != found.high).sum(-1)
    largest = float(operands.weight.abs().max())
    slack = (ties * found.scale)[:, None] * operands.weight_scale * largest + expected.abs() * DIVISION_ERROR
    return expected, output_tolerance(expected.abs() + slack, operands) + slack, int(ties.sum())


def output_tolerance(expected: Tensor, operands: Operands) -> Tensor:
    """By how much a correct output in x's dtype may differ from `expected_output`: one unit in the last place.

    The float32 roundings before the last one count too where product and bias nearly cancel.
    """
    size = expected.abs() if operands.bias is None else expected.abs() + operands.bias.abs()
    return expected.abs() * torch.finfo(operands.x.dtype).eps + size * 2.0**-21


def unpack_words(words: Tensor) -> Tensor:
    """int8 [..., 8 k] from int32 [..., k]: element 0 in the low nibble."""
    shifts = torch.arange(INT4_PER_WORD, dtype=torch.int32) * 4
    nibbles = (words.cpu()[..., None] >> shifts) & 15
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)
