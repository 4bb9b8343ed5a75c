# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's real linear layers with our method, on the stand-in's operators, against the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.linears import load, relative_error
from tests.npu.linears import (
    DYNAMIC,
    FLATQUANT,
    OTHER_ROUNDINGS,
    SAME_ROUNDINGS,
    Linear,
    inputs,
    open_config,
    output,
    planned_kernel,
)
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.ops.npu import cann
from vllm_w4a4_plugin.ops.npu.select import Kernel

pytestmark = pytest.mark.usefixtures("config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [1.0, 0.97, 0.8])
def test_kronecker_path(column: Callable[..., Any], clip: float, dtype: torch.dtype, calls: list[Any]) -> None:
    linear = Linear(48, 192, clip=clip)
    layer = column(linear, params_dtype=dtype)
    calls.clear()
    x = inputs(192, dtype=dtype)
    found = output(layer, x)
    assert [name for name, _ in calls] == ["npu_kronecker_quant", "npu_quant_matmul"]
    assert relative_error(found, linear.expected(x)) < SAME_ROUNDINGS
    assert layer.quant_method.scheme.operator == Kernel.KRONECKER
    assert layer.quant_method.scheme.remark == ""
    assert planned_kernel(linear) == (Kernel.KRONECKER, "")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 24), st.integers(1, 8).map(lambda n: 8 * n), st.integers(1, 9), st.integers(0, 999))
def test_kronecker_path_for_many_shapes(tmp_path: Path, left: int, right: int, tokens: int, seed: int) -> None:
    from vllm_ascend.ops.linear import AscendReplicatedLinear

    linear = Linear(16, left * right, left, right, seed=seed)
    config = open_config(tmp_path, {"mlp.up": linear})
    layer = AscendReplicatedLinear(
        linear.features, 16, False, params_dtype=torch.bfloat16, quant_config=config, prefix="model.layers.0.mlp.up"
    )
    x = inputs(linear.features, tokens)
    found = output(load(layer, {None: linear}), x)
    expected = linear.expected(x)
    # A sum of a few terms may nearly cancel; what counts is the error against the size of the terms.
    assert (found - expected).float().norm() < 0.05 * (linear.values["weight_scale"].max() * linear.features)


def test_fused_projections(tmp_path: Path) -> None:
    from vllm_ascend.ops.linear import AscendQKVParallelLinear

    shards = {"q": Linear(128, 192, seed=1), "k": Linear(64, 192, seed=2), "v": Linear(64, 192, seed=3)}
    config = open_config(tmp_path, {f"self_attn.{name}_proj": linear for name, linear in shards.items()})
    layer = AscendQKVParallelLinear(
        192,
        64,
        2,
        1,
        False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix="model.layers.0.self_attn.qkv_proj",
    )
    x = inputs(192)
    expected = torch.cat([linear.expected(x) for linear in shards.values()], -1)
    assert relative_error(output(load(layer, shards), x), expected) < SAME_ROUNDINGS


def test_bias_is_added_once_inside_the_matmul(column: Callable[..., Any], calls: list[Any]) -> None:
    linear = Linear(48, 192, bias=True)
    layer = column(linear)
    calls.clear()
    x = inputs(192)
    assert relative_error(output(layer, x), linear.expected(x)) < SAME_ROUNDINGS
    (bias,) = [kwargs["bias"] for name, kwargs in calls if name == "npu_quant_matmul"]
    assert bias is layer.bias
    # Tokens of zeros give the bias and nothing else.
    assert torch.equal(output(layer, torch.zeros_like(x)), layer.bias.expand(7, -1))


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (12, None, "up: no right_trans, npu_kronecker_quant needs both"),
        (None, 16, "up: no left_trans, npu_kronecker_quant needs both"),
        (264, 8, "up: factors 264 x 8, npu_kronecker_quant takes at most 256"),
        (16, 12, "up: right_trans of size 12, npu_kronecker_quant needs a multiple of 8"),
        (None, None, "up: no left_trans and no right_trans, npu_kronecker_quant needs both"),
    ],
)
def test_fallback(
    column: Callable[..., Any], left: int | None, right: int | None, reason: str, calls: list[Any]
) -> None:
    features = left * right if left and right else 192
    linear = Linear(48, features, left, right, bias=True)
    layer = column(linear)
    calls.clear()
    x = inputs(features)
    found = output(layer, x)
    assert [name for name, _ in calls] == ["npu_dynamic_quant", "npu_quant_matmul"]
    assert relative_error(found, linear.expected(x, with_npu_roundings=False)) < OTHER_ROUNDINGS
    (row,) = layer.quant_config.report.table().splitlines()[2:]
    assert Kernel.UNFUSED in row
    assert reason in row
    assert planned_kernel(linear) == (Kernel.UNFUSED, reason.removeprefix("up: "))


def test_fallback_with_a_small_clip_ratio_says_what_it_cannot(column: Callable[..., Any]) -> None:
    """npu_dynamic_quant never gives -8, which the formula gives for clip ratios below 14/15."""
    layer = column(Linear(48, 192, 12, None, clip=0.9))
    assert "clip_ratio below 0.933: int4 values stop at -7" in layer.quant_method.scheme.remark


def test_layers_without_a_transform(column: Callable[..., Any], calls: list[Any]) -> None:
    linear = Linear(48, 192, kind=DYNAMIC, bias=True)
    layer = column(linear)
    calls.clear()
    x = inputs(192)
    found = output(layer, x)
    assert [name for name, _ in calls] == ["npu_dynamic_quant", "npu_quant_matmul"]
    assert relative_error(found, linear.expected(x, with_npu_roundings=False)) < SAME_ROUNDINGS
    assert layer.quant_method.scheme.operator == Kernel.UNTRANSFORMED
    assert planned_kernel(linear) == (Kernel.UNTRANSFORMED, "")


def test_weights_are_packed_tensor_by_tensor(column: Callable[..., Any], calls: list[Any]) -> None:
    layer = column(Linear(48, 192))
    assert [name for name, _ in calls] == ["npu_convert_weight_to_int4pack"]
    assert layer.weight.dtype == torch.int32
    assert layer.weight.shape == (48, 24)
    assert layer.quant_method.scheme.weight_bytes(layer) == 48 * 192 // 2


def test_packing_in_parts_is_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-8, 8, (37, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    whole = cann.pack_int4(weight, weight.device)
    monkeypatch.setattr(cann, "PACKED_AT_ONCE", 5 * 64)
    assert torch.equal(cann.pack_int4(weight, weight.device), whole)


def test_no_token_at_all(column: Callable[..., Any]) -> None:
    assert output(column(Linear(48, 192)), inputs(192, 0)).shape == (0, 48)
    assert output(column(Linear(48, 192, kind=DYNAMIC)), inputs(192, 0)).shape == (0, 48)


@pytest.mark.parametrize("kind", [FLATQUANT, DYNAMIC])
def test_row_parallel_layers_quantize_as_one_device_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, calls: list[Any]
) -> None:
    """With a transform each device gathers the tokens, without one only their largest magnitudes."""
    from vllm.model_executor import parameter
    from vllm_ascend.ops.linear import AscendRowParallelLinear
    from vllm_ascend.quantization import method_adapters

    from vllm_w4a4_plugin.quantization.schemes import w4a4_npu, whole_tokens

    linear = Linear(48, 192, bias=True, kind=kind)
    x = inputs(192)
    x[:, :96] *= 8  # on the first device
    maxima = torch.cat([half.abs().amax(-1, keepdim=True).float() for half in x.chunk(2, -1)], -1)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("vllm_ascend.ops.linear.get_parallel_op", lambda *a, rank=rank: (None, rank, 2))
        for module in (parameter, method_adapters):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 2)
        monkeypatch.setattr(w4a4_npu, "get_tensor_model_parallel_world_size", lambda: 2)
        monkeypatch.setattr(w4a4_npu, "tensor_model_parallel_all_gather", lambda part: x)
        monkeypatch.setattr(whole_tokens, "tensor_model_parallel_all_gather", lambda maximum: maxima)
        layer = AscendRowParallelLinear(
            192,
            48,
            True,
            params_dtype=torch.bfloat16,
            quant_config=open_config(tmp_path, {"mlp.down": linear}),
            prefix="model.layers.0.mlp.down",
        )
        load(layer, {None: linear})
        assert layer.weight.shape == (48, 12)
        columns = slice(96 * rank, 96 * (rank + 1))
        bias = layer.bias if rank == 0 else None
        parts.append(layer.quant_method.apply(layer, x[:, columns].contiguous(), bias).float())
    expected = linear.expected(x, with_npu_roundings=kind == FLATQUANT)
    assert relative_error((parts[0] + parts[1]).bfloat16(), expected) < SAME_ROUNDINGS


def test_devices_may_have_scales_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gathered: nobody pretends that there is another device."""
    from vllm.model_executor import parameter
    from vllm_ascend.ops.linear import AscendRowParallelLinear
    from vllm_ascend.quantization import method_adapters

    monkeypatch.setenv("VLLM_W4A4_LOCAL_SCALES", "1")
    monkeypatch.setattr("vllm_ascend.ops.linear.get_parallel_op", lambda *a: (None, 0, 2))
    for module in (parameter, method_adapters):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 2)
    linear = Linear(48, 192, kind=DYNAMIC)
    layer = AscendRowParallelLinear(
        192,
        48,
        False,
        params_dtype=torch.bfloat16,
        quant_config=open_config(tmp_path, {"mlp.down": linear}),
        prefix="model.layers.0.mlp.down",
    )
    load(layer, {None: linear})
    x = inputs(96)
    half = Linear(48, 96, kind=DYNAMIC)
    half.values["weight"] = linear.values["weight"][:, :96]
    half.values["weight_scale"] = linear.values["weight_scale"]
    expected = half.expected(x, with_npu_roundings=False)
    assert relative_error(layer.quant_method.apply(layer, x, None), expected) < SAME_ROUNDINGS


@pytest.mark.parametrize(
    ("linear", "problem"),
    [
        (Linear(48, 36, 6, 6), "36 input features, int4 operators of the NPU need a multiple of 8"),
        (Linear(48, 192, kind=DYNAMIC, groups=2), "2 scale groups"),
        (Linear(48, 192, offset=1.0), "expected zeros, found other values"),
    ],
    ids=["features", "groups", "offset"],
)
def test_what_no_kernel_can_do_is_refused(column: Callable[..., Any], linear: Linear, problem: str) -> None:
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.0\.mlp\.up") as error:
        column(linear)
    assert problem in str(error.value)
    if not linear.offset:  # a value, which only loading sees
        assert planned_kernel(linear)[0] == Kernel.NONE
