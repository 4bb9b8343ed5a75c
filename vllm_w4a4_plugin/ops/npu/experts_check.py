# SPDX-License-Identifier: Apache-2.0
"""Whether the operators of experts compute, on made-up experts: before a process uses them, and in the device check.

Operands are small integers, as those of `trial`, so that only the documented roundings remain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

from . import cann, experts
from .experts import Groups
from .select import Kernel
from .select_experts import ExpertsChoice, ExpertsOnRank, Product, select_experts_kernel
from .self_check import Variant, fault_of

COUNTS = (2, 0, 15)
"""Rows of each expert. One has none; another tile than the first one begins after sixteen rows."""
SPARE_ROWS = 3
"""Rows that belong to no expert."""

INPUTS, OUTPUTS, SCALE_GROUPS = 192, 48, 3
FACTORS = (12, 16)


@dataclass(frozen=True)
class ExpertsVariant:
    """What decides which operators run, and how.

    Attributes:
        product: of int4 tokens and weights.
        dtype: of the activations.
        has_groups: whether a weight's row has several scales.
        has_bias: whether there are biases.
        has_left, has_right: whether down has these factors.
    """

    product: Product
    dtype: torch.dtype
    has_groups: bool = False
    has_bias: bool = False
    has_left: bool = False
    has_right: bool = False


def select_working_experts(shape: ExpertsOnRank, dtype: torch.dtype, device: torch.device) -> ExpertsChoice:
    """`select_experts_kernel` among the kernels that pass the self check on a device."""
    broken: dict[Kernel | Product, str] = {}
    while True:
        choice = select_experts_kernel(shape, broken=broken)
        if choice.product is Product.NONE:
            return choice
        gate_up, down = shape.gate_up, shape.down
        variant = Variant(choice.quantizer, dtype, gate_up.left is not None, gate_up.right is not None)
        if fault := fault_of(variant, device):
            broken[choice.quantizer] = fault
            continue
        of_experts = ExpertsVariant(
            choice.product,
            dtype,
            max(shape.groups) > 1,
            shape.has_bias,
            down.left is not None,
            down.right is not None,
        )
        if fault := fault_of_experts(of_experts, device):
            broken[choice.product] = fault
            continue
        return choice


def fault_of_experts(variant: ExpertsVariant, device: torch.device) -> str:
    """What is wrong with a variant on a device, as `self_check.fault_of`."""
    if not envs.VLLM_W4A4_SELF_CHECK or not cann.runs_on(device):
        return ""
    return _fault_of(variant, device)


def product_fault(
    variant: ExpertsVariant, device: torch.device, sizes: tuple[int, int], counts: tuple[int, ...], scale_groups: int
) -> str:
    """What is wrong with the product of int4 tokens and the weights of their experts.

    Args:
        variant: of the experts.
        device: that computes.
        sizes: (outputs, inputs) of each weight.
        counts: rows of each expert.
        scale_groups: scales per row of a weight.
    """
    generator = torch.Generator().manual_seed(sum(counts))
    outputs, inputs = sizes
    rows = sum(counts) + SPARE_ROWS

    def integers(*shape: int) -> Tensor:
        return torch.randint(INT4_MIN, INT4_MAX + 1, shape, generator=generator).to(torch.int8)

    def fractions(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32) * 0.02 + 1e-3

    q, weight, scale = integers(rows, inputs), integers(len(counts), outputs, inputs), fractions(rows)
    weight_scale = fractions(len(counts), scale_groups, outputs)
    bias = torch.randn(len(counts), outputs, generator=generator, dtype=torch.float32) if variant.has_bias else None
    groups = _groups(counts, device)
    packed_q, device_scale = cann.pack_int4(q, device), scale.to(device)
    if variant.product is Product.GROUPED:
        packed = torch.stack([experts.pack_grouped(matrix, device) for matrix in weight])
        words = experts.scale_words(weight_scale if scale_groups > 1 else weight_scale[:, 0]).to(device)
        y = experts.grouped_linear(packed_q, device_scale, packed, words, groups, variant.dtype)
        weight_scale = experts.scale_words(weight_scale).to(torch.int32).view(torch.float32)
    else:
        packed = torch.stack([cann.pack_int4(matrix, device) for matrix in weight])
        own = None if bias is None else bias.to(device)
        y = experts.linear_per_expert(
            packed_q, device_scale, packed, weight_scale[:, 0].to(device), own, groups, variant.dtype
        )
    expected, size = _products(q, scale, weight, weight_scale, bias, counts)
    # Each scaled sum is rounded to float16 at most, and the result to its own dtype.
    tolerance = size * 2.0**-11 + (size + expected.abs()) * torch.finfo(variant.dtype).eps
    return _compare(y[: sum(counts)], expected, tolerance, "products")


def transform_fault(
    dtype: torch.dtype, device: torch.device, factors: tuple[int | None, int | None], size: int, counts: tuple[int, ...]
) -> str:
    """What is wrong with the transform of down's input, for factors of these sizes and `size` features."""
    generator = torch.Generator().manual_seed(size)
    rows = sum(counts) + SPARE_ROWS
    x = torch.randint(-9, 10, (rows, size), generator=generator).to(dtype)
    left, right = (
        None if n is None else torch.randint(-2, 3, (len(counts), n, n), generator=generator).to(dtype) for n in factors
    )
    groups = _groups(counts, device)
    own_left, own_right = (None if factor is None else factor.to(device) for factor in (left, right))
    y = experts.transform(x.to(device), own_left, own_right, groups)[: sum(counts)]
    first, expected = 0, []
    for expert, count in enumerate(counts):
        m = factors[0] or size // (factors[1] or size)
        tokens = x[first : first + count].float().reshape(count, m, size // m)
        if right is not None:
            tokens = (tokens @ right[expert].float()).to(dtype).float()
        if left is not None:
            tokens = (left[expert].float().T @ tokens).to(dtype).float()
        expected.append(tokens.reshape(count, size))
        first += count
    wanted = torch.cat(expected)
    return _compare(y, wanted, wanted.abs() * torch.finfo(dtype).eps, "transformed features")


def swiglu_fault(dtype: torch.dtype, device: torch.device, size: int, rows: int) -> str:
    """What is wrong with silu(gate) * up, for `size` intermediate features."""
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(rows, 2 * size, generator=generator, dtype=torch.float32) * 3).to(dtype)
    gate, up = x.float().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    tolerance = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-4
    return _compare(experts.swiglu(x.to(device)), expected, tolerance, "activations")


@cache
def _fault_of(variant: ExpertsVariant, device: torch.device) -> str:
    try:
        with torch.no_grad(), torch.device("cpu"):
            return next(filter(None, _faults(variant, device)), "")
    except Exception as error:  # whatever torch_npu raises: the operator is of no use then
        return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _faults(variant: ExpertsVariant, device: torch.device) -> Iterator[str]:
    scale_groups = SCALE_GROUPS if variant.has_groups else 1
    yield product_fault(variant, device, (OUTPUTS, INPUTS), COUNTS, scale_groups)
    yield swiglu_fault(variant.dtype, device, OUTPUTS, sum(COUNTS))
    if variant.has_left or variant.has_right:
        left, right = FACTORS
        factors = (left if variant.has_left else None, right if variant.has_right else None)
        yield transform_fault(variant.dtype, device, factors, INPUTS, COUNTS)


def _groups(counts: tuple[int, ...], device: torch.device) -> Groups:
    return Groups.of(torch.tensor(counts, device=device), 1, sum(counts) + SPARE_ROWS)


def _products(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(expected, sum of the magnitudes of what is added up), float32 [rows of the groups, outputs]."""
    expected, size, first = [], [], 0
    for expert, count in enumerate(counts):
        rows = slice(first, first + count)
        parts = weight_scale.shape[1]
        tokens = q[rows].float().reshape(count, parts, q.shape[1] // parts)
        matrix = weight[expert].float().reshape(weight.shape[1], parts, q.shape[1] // parts)
        terms = torch.einsum("rgk,ogk->rgo", tokens, matrix) * weight_scale[expert] * scale[rows, None, None]
        own = torch.zeros(weight.shape[1], dtype=torch.float32) if bias is None else bias[expert]
        expected.append(terms.sum(1) + own)
        size.append(terms.abs().sum(1) + own.abs())
        first += count
    return torch.cat(expected), torch.cat(size)


def _compare(found: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> str:
    wrong = ~((found.float().cpu() - expected).abs() <= tolerance)
    return f"computes {int(wrong.sum())} of {wrong.numel()} {what} wrongly" if wrong.any() else ""
