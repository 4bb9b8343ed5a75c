# SPDX-License-Identifier: Apache-2.0
"""VLLM_W4A4_ACTIVATION_BITS=8: W4A4 layers with the same weights and transforms and unclipped 8-bit activations."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import RowParallelLinear

from tests.conftest import MICRO
from tests.linears import load, relative_error
from tests.loading import engine_config
from tests.quantization.linears import IN, Linear, column_layer, inputs

KINDS = ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
VARIABLE = "VLLM_W4A4_ACTIVATION_BITS"


def expected(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """In float64; clip_ratio takes no part."""
    x = x.double()
    if linear.kind == "W4A4_FLATQUANT_DYNAMIC":
        x = x @ torch.kron(linear.left_trans, linear.right_trans).double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    groups = linear.weight_scale.shape[1]
    widened = (t.double().repeat_interleave(IN // groups, 1) for t in (linear.weight_scale, linear.weight_offset))
    weight_scale, weight_offset = widened
    y = ((x / scale).round() * scale) @ ((linear.weight - weight_offset) * weight_scale).T
    return (y if linear.bias is None else y + linear.bias).float()


@pytest.mark.usefixtures("vllm_context")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 6])
def test_arithmetic(make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch, kind: str, groups: int) -> None:
    linear = Linear(40, kind, 0, groups=groups, offset=True, bias=True)
    config = make_config(proj=linear)
    of_4_bits = load(column_layer(config, 40, bias=True), {None: linear})
    table = config.report.table()
    assert "8-bit" not in table
    monkeypatch.setenv(VARIABLE, "8")
    config = make_config(proj=linear)
    layer = load(column_layer(config, 40, bias=True), {None: linear})
    assert relative_error(layer(inputs())[0], expected(linear, inputs())) < 1e-4
    assert relative_error(of_4_bits(inputs())[0], expected(linear, inputs())) > 0.05
    assert "8-bit activations, not clipped (VLLM_W4A4_ACTIVATION_BITS=8)" in config.report.table()


@pytest.mark.usefixtures("vllm_context")
def test_row_parallel(make_config: Any, outputs_of_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "8")
    linear = Linear(40, "W4A4_FLATQUANT_DYNAMIC", 0, bias=True)
    config = make_config(proj=linear)

    def build() -> Any:
        layer = RowParallelLinear(
            IN, 40, bias=True, params_dtype=torch.float32, quant_config=config, prefix="m.proj", input_is_parallel=True
        )
        return load(layer, {None: linear})

    total = sum(outputs_of_ranks(build, inputs(), 2), torch.zeros(9, 40))
    assert relative_error(total, expected(linear, inputs())) < 1e-4


def test_compiled_graphs_of_both_are_cached_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    default = engine_config(MICRO).compute_hash()
    monkeypatch.setenv(VARIABLE, "4")
    assert engine_config(MICRO).compute_hash() == default
    monkeypatch.setenv(VARIABLE, "8")
    assert engine_config(MICRO).compute_hash() != default
    assert engine_config(MICRO, additional_config={"other": 1}).additional_config["other"] == 1


def test_other_numbers_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "6")
    with pytest.raises(ValueError, match="VLLM_W4A4_ACTIVATION_BITS: expected 4 or 8, found '6'"):
        engine_config(MICRO)
