# SPDX-License-Identifier: Apache-2.0
"""Row-parallel layers: each rank computes some of the outputs over whole tokens, as one rank does."""

from typing import Any

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.linear import RowParallelLinear

from tests.linears import load
from tests.quantization.linears import IN, Linear, assert_near, inputs
from tests.quantization.row_linears import TYPES, made
from vllm_w4a4_plugin.ops import reference

pytestmark = pytest.mark.usefixtures("vllm_context")
OUT = 41


def row_layer(config: Any, linear: Any, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    layer = RowParallelLinear(
        IN,
        OUT,
        bias="bias" in linear.tensors(),
        params_dtype=dtype,
        quant_config=config,
        prefix="m.proj",
        input_is_parallel=True,
        **arguments,
    )
    return load(layer, {None: linear})


def part_of(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x.chunk(size, -1)[rank].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("kind", "groups"), [*((kind, 1) for kind in TYPES), ("W4A4_DYNAMIC", 3), ("W4A16", 12)])
def test_the_sum_of_the_ranks_is_one_rank_to_the_bit(
    make_config: Any,
    at_rank: Any,
    outputs_of_ranks: Any,
    kind: str,
    groups: int,
    size: int,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    """Also where ranks would cut groups of the weight's scales (3 groups), and with other numbers of rows on each."""
    linear = made(kind, OUT, groups, bias)
    config = make_config(proj=linear)
    x = inputs().to(dtype)
    x[2] = 0
    whole = row_layer(config, linear, dtype)(x)[0]
    total = torch.zeros_like(whole)
    for part in outputs_of_ranks(lambda: row_layer(config, linear, dtype), x, size):
        assert (part == 0).all(0).sum() >= OUT - -(-OUT // size)
        total += part
    # Without vLLM's C extension FLOAT is torch's product, which adds up in another order for other numbers of rows.
    if kind != "FLOAT" or vllm_ops._supports_onednn:
        assert torch.equal(total, whole)
    torch.testing.assert_close(total, whole)
    if dtype == torch.float32:
        others = [token for token in range(len(x)) if token != 2]  # the formulas divide by its scale
        assert_near(whole[others], linear.expected(x[others]))


def test_a_bias_that_the_model_adds_itself(make_config: Any, outputs_of_ranks: Any) -> None:
    linear = made("W4A4_DYNAMIC", OUT, bias=True)
    config = make_config(proj=linear)
    parts = outputs_of_ranks(lambda: row_layer(config, linear, skip_bias_add=True), inputs(), 2)
    assert_near(sum(parts, -linear.bias) + 2 * linear.bias, linear.expected(inputs()))


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


@pytest.mark.parametrize("kind", ["W8A8", "W8A16", "W4A16", "W4A8_DYNAMIC", "FLOAT"])
def test_parts_of_the_input_on_request(
    make_config: Any, at_rank: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other types without transform are divided in the same way then, and their sums are near the whole."""
    monkeypatch.setenv("VLLM_W4A4_LOCAL_SCALES", "1")
    linear = made(kind, OUT, bias=True)
    config = make_config(proj=linear)
    total = torch.zeros(9, OUT)
    for rank in range(2):
        at_rank(rank, 2)
        total += row_layer(config, linear)(part_of(inputs(), rank, 2))[0]
    assert ((total - linear.expected(inputs())).norm() / total.norm()) < 0.01


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_on_one_rank_is_seen_on_all(
    make_config: Any, outputs_of_ranks: Any, kind: str, value: float
) -> None:
    linear = made(kind, OUT)
    config = make_config(proj=linear)
    x = inputs()
    x[4, 7] = value  # on rank 0
    total = sum(outputs_of_ranks(lambda: row_layer(config, linear), x, 2))
    assert (~total.isfinite()).all(-1).tolist() == [token == 4 for token in range(9)]
    assert total[:4].isfinite().all()


FEATURES = IN // 2
SENT = {
    **dict.fromkeys(("W4A4_DYNAMIC", "W4A8_DYNAMIC", "W8A8"), (FEATURES + 4, FEATURES + 4)),
    **dict.fromkeys(
        ("W4A4_FLATQUANT_DYNAMIC", "W4A8_FLATQUANT_DYNAMIC", "W8A8_FLATQUANT_DYNAMIC", "W8A16", "W4A16", "FLOAT"),
        (4 * FEATURES, 2 * FEATURES),
    ),
}


@pytest.mark.parametrize("kind", SENT)
def test_the_table_says_what_is_sent(make_config: Any, at_rank: Any, kind: str) -> None:
    for dtype, sent in zip((torch.float32, torch.bfloat16), SENT[kind], strict=True):
        linear = made(kind, OUT)
        config = make_config(proj=linear)
        at_rank(0, 2)
        row_layer(config, linear, dtype)
        assert f"sends each rank {sent} bytes per token and layer" in config.report.table()
        at_rank(0, 1)
        config = make_config(proj=linear)
        row_layer(config, linear, dtype)
        assert "sends" not in config.report.table()


@pytest.mark.parametrize("is_faulty", [False, True])
def test_w8a8_dynamic_sends_what_its_kernel_takes(
    make_config: Any, at_rank: Any, outputs_of_ranks: Any, monkeypatch: pytest.MonkeyPatch, is_faulty: bool
) -> None:
    """vLLM's kernels quantize by themselves and need the values; ours take codes."""
    from vllm_w4a4_plugin.quantization.schemes import w8a8_dynamic

    if not is_faulty and w8a8_dynamic.fault_of_vllm_kernel(torch.float32):
        pytest.skip("vLLM's kernel does not compute here")
    monkeypatch.setattr(w8a8_dynamic, "fault_of_vllm_kernel", lambda dtype: "wrong" if is_faulty else "")
    linear = made("W8A8_DYNAMIC", OUT)
    config = make_config(proj=linear)
    whole = row_layer(config, linear)(inputs())[0]
    parts = outputs_of_ranks(lambda: row_layer(config, linear), inputs(), 2)
    assert torch.equal(sum(parts), whole)
    sent = FEATURES + 4 if is_faulty else 4 * FEATURES
    assert f"sends each rank {sent} bytes per token and layer" in config.report.table()
