# SPDX-License-Identifier: Apache-2.0
"""Row-parallel layers: every rank quantizes its part of a token as the whole token is quantized."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import RowParallelLinear

from tests.linears import load
from tests.quantization.linears import IN, KINDS, Linear, assert_near, inputs
from vllm_w4a4_plugin.ops import reference

pytestmark = pytest.mark.usefixtures("vllm_context")
OUT = 40


def row_layer(config: Any, linear: Linear, dtype: torch.dtype = torch.float32) -> Any:
    layer = RowParallelLinear(
        IN,
        OUT,
        bias=linear.bias is not None,
        params_dtype=dtype,
        quant_config=config,
        prefix="m.proj",
        input_is_parallel=True,
    )
    return load(layer, {None: linear})


def part_of(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x.chunk(size, -1)[rank].contiguous()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("kind", "groups"), [*((kind, 1) for kind in KINDS), ("W4A4_DYNAMIC", 4)])
def test_the_ranks_outputs_add_up(
    make_config: Any, at_rank: Any, all_ranks_have: Any, kind: str, groups: int, size: int, bias: bool
) -> None:
    """To the whole layer's, with the same int4 values as on one rank; bias counts once."""
    linear = Linear(OUT, kind, 0, groups=groups, bias=bias)
    config = make_config(proj=linear)
    x = inputs()
    all_ranks_have(x, size)
    total = torch.zeros(9, OUT)
    for rank in range(size):
        at_rank(rank, size)
        total += row_layer(config, linear)(part_of(x, rank, size))[0]
    assert_near(total, linear.expected(x))


@pytest.mark.parametrize("kind", ["W4A4_DYNAMIC", "W8A8_DYNAMIC"])
def test_scales_of_the_ranks_own_on_request(
    make_config: Any, at_rank: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is gathered: nobody pretends that there is another rank."""
    monkeypatch.setenv("VLLM_W4A4_LOCAL_SCALES", "1")
    linear = Linear(OUT, kind, 0)
    config = make_config(proj=linear)
    for rank in range(2):
        at_rank(rank, 2)
        layer = row_layer(config, linear)
        x = part_of(inputs(), rank, 2)
        weight, scale = part_of(linear.weight, rank, 2), linear.weight_scale.squeeze(1)
        if kind == "W4A4_DYNAMIC":
            expected = reference.flatquant_linear(x, weight, scale, None, None)
        else:
            expected = reference.w8a8_linear(x, weight, scale)
        assert_near(layer.quant_method.apply(layer, x), expected)
        assert "a scale of its own (VLLM_W4A4_LOCAL_SCALES=1)" in config.report.table()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_on_one_rank_is_seen_on_all(
    make_config: Any, at_rank: Any, all_ranks_have: Any, kind: str, value: float
) -> None:
    linear = Linear(OUT, kind, 0)
    config = make_config(proj=linear)
    x = inputs()
    x[4, 7] = value  # on rank 0
    all_ranks_have(x, 2)
    at_rank(1, 2)
    y = row_layer(config, linear)(part_of(x, 1, 2))[0]
    assert y.isnan().all(-1).tolist() == [token == 4 for token in range(9)]


@pytest.mark.parametrize(("dtype", "gathered"), [(torch.float32, 384), (torch.bfloat16, 192)])
def test_the_table_says_what_is_sent(
    make_config: Any, at_rank: Any, all_ranks_have: Any, dtype: torch.dtype, gathered: int
) -> None:
    for kind, sent in zip(KINDS, (gathered, 4, 4), strict=True):
        linear = Linear(OUT, kind, 0)
        config = make_config(proj=linear)
        at_rank(0, 2)
        row_layer(config, linear, dtype)
        assert f"row-parallel: sends {sent} bytes per token and layer" in config.report.table()
        at_rank(0, 1)
        config = make_config(proj=linear)
        row_layer(config, linear, dtype)
        assert "row-parallel" not in config.report.table()
