# SPDX-License-Identifier: Apache-2.0
"""Which kernels experts get on NPUs, by the limits in CANN's documents."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import QuantType
from vllm_w4a4_plugin.ops.npu.select import Kernel
from vllm_w4a4_plugin.ops.npu.select_experts import ExpertsChoice, ExpertsOnRank, Product, select_experts_kernel

DYNAMIC, FLATQUANT = QuantType.W4A4_DYNAMIC, QuantType.W4A4_FLATQUANT_DYNAMIC


def shape(kind: QuantType = DYNAMIC, hidden: int = 2048, intermediate: int = 768, **others: Any) -> ExpertsOnRank:
    """Qwen3-30B-A3B's experts."""
    factors = {"left": 32, "right": 64} if kind is FLATQUANT else {}
    gate = LinearSpec("m.mlp.experts.0.gate_proj", kind, intermediate, hidden, **factors)
    factors = {"left": 24, "right": 32} if kind is FLATQUANT else {}
    down = LinearSpec("m.mlp.experts.0.down_proj", kind, hidden, intermediate, **factors)
    return ExpertsOnRank(gate, down, **{"experts": 128, **others})


def test_the_usual_ones() -> None:
    assert select_experts_kernel(shape()) == ExpertsChoice(Product.GROUPED, Kernel.UNTRANSFORMED)
    assert select_experts_kernel(shape(FLATQUANT)) == ExpertsChoice(Product.GROUPED, Kernel.KRONECKER)
    assert select_experts_kernel(shape(FLATQUANT)).kernel == "npu_kronecker_quant + npu_grouped_matmul"
    assert select_experts_kernel(shape(ranks=4)).reason == ""


def test_a_bias_is_no_part_of_grouped_int4_products() -> None:
    biased = shape()
    choice = select_experts_kernel(replace(biased, down=replace(biased.down, has_bias=True)))
    assert choice.product is Product.PER_EXPERT
    assert choice.reason == "npu_grouped_matmul adds no bias to int4 products"


def test_a_factor_that_npu_kronecker_quant_does_not_take() -> None:
    experts = shape(FLATQUANT)
    choice = select_experts_kernel(replace(experts, gate_up=replace(experts.gate_up, left=None)))
    assert choice.kernel == "matmul + npu_dynamic_quant + npu_grouped_matmul"
    assert choice.reason == "no left_trans, npu_kronecker_quant needs both"


def test_broken_kernels_give_way() -> None:
    broken = {Product.GROUPED: "raises"}
    choice = select_experts_kernel(shape(), broken=broken)
    assert choice.product is Product.PER_EXPERT
    assert choice.reason == "self check: npu_grouped_matmul raises"
    choice = select_experts_kernel(shape(FLATQUANT), broken={Kernel.KRONECKER: "computes wrongly"})
    assert choice.kernel == "matmul + npu_dynamic_quant + npu_grouped_matmul"
    nothing = select_experts_kernel(shape(), broken={**broken, Product.PER_EXPERT: "raises"})
    assert nothing.kernel == Kernel.NONE
    assert select_experts_kernel(shape(), broken={Kernel.UNTRANSFORMED: "raises"}).kernel == Kernel.NONE


def grouped(gate_up: int, down: int, **others: Any) -> ExpertsOnRank:
    experts = shape(**others)
    return replace(experts, gate_up=replace(experts.gate_up, groups=gate_up), down=replace(experts.down, groups=down))


def test_scale_groups() -> None:
    assert select_experts_kernel(grouped(8, 3)) == ExpertsChoice(Product.GROUPED, Kernel.UNTRANSFORMED)
    assert grouped(8, 3, ranks=3).groups == (8, 1)
    assert select_experts_kernel(grouped(8, 3), broken={Product.GROUPED: "raises"}).kernel == Kernel.NONE


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (shape(intermediate=772), "772 intermediate features, int4 operators of the NPU need a multiple of 8"),
        (shape(hidden=2052), "2052 hidden features, int4 operators of the NPU need a multiple of 8"),
        (shape(ranks=64), "12 intermediate features, int4 operators of the NPU need a multiple of 8"),
        (shape(ranks=5), "768 intermediate features cannot be divided over 5 devices"),
        (shape(intermediate=32768), "65536 features, npu_grouped_matmul takes at most 65535"),
        (shape(experts=1025), "1025 experts on a device, npu_grouped_matmul takes at most 1024"),
        (grouped(8, 3, ranks=2), "3 scale groups per row of down cannot be divided over 2 devices"),
        (grouped(8, 256), "scale groups of 3 features, npu_grouped_matmul needs an even number"),
        (
            replace(grouped(8, 3), down=replace(grouped(8, 3).down, has_bias=True)),
            "biases and scale groups, npu_grouped_matmul takes no bias and npu_quant_matmul no groups",
        ),
    ],
)
def test_what_the_documents_exclude(experts: ExpertsOnRank, reason: str) -> None:
    assert select_experts_kernel(experts) == ExpertsChoice(Product.NONE, reason=reason)
