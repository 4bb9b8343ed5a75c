# SPDX-License-Identifier: Apache-2.0
"""Kernels per layer; tests/npu checks that the loader chooses the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vllm_w4a4_plugin.capacity.kernels import kernels_of
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops.npu.select import Kernel


def test_the_tutorials_model(config_only: Callable[..., Path]) -> None:
    found = list(kernels_of(read_model(config_only()), 1))
    assert [(k.layers, k.count, k.kernel, k.reason) for k in found] == [
        ("q_proj k_proj v_proj gate_proj up_proj", 320, Kernel.KRONECKER, ""),
        ("o_proj", 64, Kernel.VLLM_ASCEND, ""),
        ("down_proj", 64, Kernel.VLLM_ASCEND, ""),
    ]


def test_o_proj_without_a_right_factor_falls_back(config_only: Callable[..., Path]) -> None:
    found = {k.layers: k for k in kernels_of(read_model(config_only(), "all-w4a4"), 1)}
    assert found["o_proj"].kernel == Kernel.UNFUSED
    assert "no right_trans" in found["o_proj"].reason


def test_a_part_that_no_kernel_takes_is_named(config_only: Callable[..., Path]) -> None:
    model = read_model(config_only(hidden_size=5120, intermediate_size=25632), "all-w4a4")
    found = {k.layers: k for k in kernels_of(model, 8)}  # 25632 / 8 = 3204 = 4 mod 8
    assert found["down_proj"].kernel == Kernel.NONE
    assert "3204 input features" in found["down_proj"].reason


def test_a_quantized_head_needs_as_many_ranks_as_the_operator_asks_for(config_only: Callable[..., Path]) -> None:
    model = read_model(config_only())  # 151936 tokens
    assert model.head is not None
    model = replace(model, head=replace(model.head, quant_type=QuantType.W8A8_DYNAMIC))
    for ranks, fits in ((1, False), (2, False), (4, True), (8, True)):
        (head,) = (k for k in kernels_of(model, ranks) if k.layers == "lm_head" or "lm_head" in k.layers.split())
        assert (head.kernel == Kernel.VLLM_ASCEND) == fits
        assert head.reason == (
            ""
            if fits
            else f"{151936 // ranks} output features on a device, npu_quant_matmul takes at most 65535; use "
            "more tensor-parallel ranks"
        )
