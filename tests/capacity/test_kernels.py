# SPDX-License-Identifier: Apache-2.0
"""Kernels per layer; tests/npu checks that the loader chooses the same."""

from collections.abc import Callable
from pathlib import Path

from vllm_w4a4_plugin.capacity.kernels import NONE, THEIRS, choose_kernels
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.npu_limits import KRONECKER, UNFUSED


def test_the_tutorials_model(config_only: Callable[..., Path]) -> None:
    found = list(choose_kernels(read_model(config_only()), 1))
    assert [(k.layers, k.count, k.kernel, k.reason) for k in found] == [
        ("q_proj k_proj v_proj gate_proj up_proj", 320, KRONECKER, ""),
        ("o_proj", 64, THEIRS, ""),
        ("down_proj", 64, THEIRS, ""),
    ]


def test_o_proj_without_a_right_factor_falls_back(config_only: Callable[..., Path]) -> None:
    found = {k.layers: k for k in choose_kernels(read_model(config_only(), "all-w4a4"), 1)}
    assert found["o_proj"].kernel == UNFUSED
    assert "no right_trans" in found["o_proj"].reason


def test_a_part_that_no_kernel_takes_is_named(config_only: Callable[..., Path]) -> None:
    model = read_model(config_only(hidden_size=5120, intermediate_size=25632), "all-w4a4")
    found = {k.layers: k for k in choose_kernels(model, 8)}  # 25632 / 8 = 3204 = 4 mod 8
    assert found["down_proj"].kernel == NONE
    assert "3204 input features" in found["down_proj"].reason
