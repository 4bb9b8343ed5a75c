# SPDX-License-Identifier: Apache-2.0
"""The types that checkpoints mix with W4A4, each against its formula, written out here in float64.

Layers are loaded through vLLM's own parameter loading, as q/k/v, as a row-parallel layer and again with other tensors;
`verify`, the plan and loading must agree.
"""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from tests.linears import load, relative_error
from tests.quantization.linears import IN, column_layer, inputs
from tests.quantization.typed_linears import INPUT_OFFSET, INPUT_SCALE, Stored, make
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

pytestmark = pytest.mark.usefixtures("vllm_context")
CASES = [
    ("W8A8", ""),
    ("W8A8", "integers"),
    ("W8A8", "scales"),
    ("W8A8_FLATQUANT_DYNAMIC", ""),
    ("W4A8_DYNAMIC", ""),
    ("W4A8_DYNAMIC", "packed"),
    ("W4A8_DYNAMIC", "second"),
    ("W4A8_FLATQUANT_DYNAMIC", ""),
    ("W4A8_FLATQUANT_DYNAMIC", "packed"),
    ("W8A16", ""),
    ("W8A16", "offset"),
    ("W4A16", "groups"),
    ("W4A16", "offset"),
]
all_cases = pytest.mark.parametrize(("kind", "variant"), CASES)


def without_scale_bias(linear: Stored) -> Stored:
    """What vLLM's model is given: the loader keeps tensors of no use from it."""
    stored = {name: tensor for name, tensor in linear.stored.items() if name != "scale_bias"}
    return Stored(linear.kind, linear.weight, linear.bias, stored)


def assert_right(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found, expected) < 1e-4  # an 8-bit rounding that falls the other way


@all_cases
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_qkv_and_loading_again(
    make_config: Any, at_rank: Any, tmp_path: Any, kind: str, variant: str, bias: bool, size: int
) -> None:
    head, heads, kv_heads = 16, 4, 2

    def parts(seed: int) -> dict[str, Stored]:
        rows = zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        return {name: make(kind, n * head, seed + i, variant, bias) for i, (name, n) in enumerate(rows)}

    first, second = parts(0), parts(10)
    config = make_config(**{f"{name}_proj": linear for name, linear in first.items()})
    reader = CheckpointReader(tmp_path)
    assert [f for f in header_findings(reader) if "config" not in f] == []
    assert list(value_findings(reader)) == []
    for rank in range(size):
        at_rank(rank, size)
        layer = QKVParallelLinear(
            IN, head, heads, kv_heads, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
        )
        for linears in (first, second, first):
            load(layer, {name: without_scale_bias(linear) for name, linear in linears.items()})
            expected = [linear.expected(inputs()).chunk(size, -1)[rank] for linear in linears.values()]
            assert_right(layer(inputs())[0], torch.cat(expected, -1))


@all_cases
def test_vllms_layerwise_reload(make_config: Any, at_rank: Any, kind: str, variant: str) -> None:
    """The storage stays where it is, because compiled graphs hold it, and shows the new weights."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    first, second = ([make(kind, 16, seed + i, variant) for i in range(2)] for seed in (0, 10))
    config = make_config(gate_proj=first[0], up_proj=first[1])
    layer = MergedColumnParallelLinear(
        IN, [16, 16], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
    )
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load(layer, dict(enumerate(map(without_scale_bias, first))))
    storage = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for linears in (second, first):
        initialize_layerwise_reload(model)
        for shard, linear in enumerate(map(without_scale_bias, linears)):
            for name, tensor in linear.stored.items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, shard)
        finalize_layerwise_reload(model, None)
        assert_right(layer(inputs())[0], torch.cat([linear.expected(inputs()) for linear in linears], -1))
    assert storage == {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}


@all_cases
def test_row_parallel(make_config: Any, outputs_of_ranks: Any, kind: str, variant: str) -> None:
    linear = make(kind, 40, 3, variant, bias=True)
    config = make_config(proj=linear)

    def build() -> Any:
        layer = RowParallelLinear(
            IN, 40, bias=True, params_dtype=torch.float32, quant_config=config, prefix="m.proj", input_is_parallel=True
        )
        return load(layer, {None: without_scale_bias(linear)})

    assert_right(sum(outputs_of_ranks(build, inputs(), 2), torch.zeros(9, 40)), linear.expected(inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_cases
def test_16_bit_activations(make_config: Any, at_rank: Any, kind: str, variant: str, dtype: torch.dtype) -> None:
    linear = make(kind, 40, 3, variant)
    layer = column_layer(make_config(proj=linear), 40)
    load(layer, {None: without_scale_bias(linear)})
    x = inputs().to(dtype)
    # The output's own rounding and, in float16 too, a rounding of an activation that falls the other way.
    assert relative_error(layer(x)[0], linear.expected(x).to(dtype)) < 2**-9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@all_cases
def test_a_token_that_is_not_finite_stays_visible(
    make_config: Any, at_rank: Any, kind: str, variant: str, value: float
) -> None:
    linear = make(kind, 40, 0, variant)
    layer = column_layer(make_config(proj=linear), 40)
    load(layer, {None: without_scale_bias(linear)})
    x = inputs()
    expected = layer(x)[0].clone()
    x[4, 7] = value
    found = layer(x)[0]
    assert not found[4].isfinite().any()
    others = [token for token in range(len(x)) if token != 4]
    assert torch.equal(found[others], expected[others])


def test_static_quantization_saturates(make_config: Any, at_rank: Any) -> None:
    linear = make("W8A8", 40, 0)
    layer = column_layer(make_config(proj=linear), 40)
    load(layer, {None: linear})
    x = inputs() * 100
    assert (x / INPUT_SCALE + INPUT_OFFSET).round().min() < -128
    assert_right(layer(x)[0], linear.expected(x))


def test_static_scales_of_fused_shards_must_be_equal(make_config: Any, at_rank: Any, tmp_path: Any) -> None:
    parts = {name: make("W8A8", 16, i) for i, name in enumerate(("q", "k", "v"))}
    parts["v"].stored["input_scale"].mul_(1.001)
    config = make_config(**{f"{name}_proj": linear for name, linear in parts.items()})
    layer = QKVParallelLinear(
        IN, 16, 1, 1, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
    )
    with pytest.raises(
        CheckpointError, match=r"m\.v_proj\.input_scale: expected the same values as in m\.q_proj"
    ) as error:
        load(layer, parts)
    assert str(error.value) in list(value_findings(CheckpointReader(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "variant", "name", "tensor", "words"),
    [
        ("W8A8", "", "input_scale", torch.tensor([0.0]), "expected a finite scale greater than 0, found 0.0"),
        ("W8A8", "", "deq_scale", torch.full((40,), -1.0), "expected scales that are not negative"),
        ("W8A8", "", "deq_scale", torch.full((40,), 2**31), "expected the bits of finite float32 scales"),
        ("W4A8_DYNAMIC", "", "weight", torch.full((40, IN), 8, dtype=torch.int8), "expected int4 values"),
        ("W4A8_DYNAMIC", "", "weight_offset", torch.ones(40, 1), "expected zeros, found other values"),
        ("W4A8_DYNAMIC", "second", "weight_offset_second", torch.ones(40, 12), "expected zeros, found other values"),
        ("W8A8_FLATQUANT_DYNAMIC", "", "weight_offset", torch.ones(40, 1), "expected zeros, found other values"),
    ],
)
def test_bad_values(
    make_config: Any, at_rank: Any, tmp_path: Any, kind: str, variant: str, name: str, tensor: Any, words: str
) -> None:
    linear = make(kind, 40, 0, variant)
    bad = Stored(kind, linear.weight, linear.bias, {**linear.stored, name: tensor})
    layer = column_layer(make_config(proj=bad), 40)
    assert any(f"m.proj.{name}: {words}" in f for f in value_findings(CheckpointReader(tmp_path)))
    if tensor.dtype != torch.int64:  # an overflowing integer becomes a negative scale, with that error's words
        with pytest.raises(CheckpointError, match=rf"tensor m\.proj\.{name}: .*{words}"):
            load(layer, {None: bad})


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "words"),
    [
        ("W8A8", "quant_bias", torch.zeros(40), "expected dtype I32 for W8A8, found F32"),
        ("W8A8", "quant_bias", torch.zeros(39, dtype=torch.int32), "shape [40]"),
        ("W8A8", "input_offset", torch.zeros(2), "expected one value"),
        ("W8A8", "left_trans", torch.eye(IN), "expected no such tensor in a W8A8 layer"),
        ("W4A8_DYNAMIC", "weight_scale", torch.ones(40, 12), "expected one scale per output row for W4A8_DYNAMIC"),
        ("W4A8_DYNAMIC", "weight_scale_second", torch.ones(40, 7), "a number of groups that divides the 192"),
        ("W4A8_DYNAMIC", "scale_bias", torch.ones(39, 16), "expected 40 rows"),
        ("W8A16", "input_scale", torch.ones(1), "expected no such tensor in a W8A16 layer"),
        ("W8A16", "weight", torch.zeros(20, IN, dtype=torch.int8), "shape [20, 1]"),
        ("W4A16", "weight", torch.zeros(20, IN, dtype=torch.int8), "shape [20, 1]"),
        ("W4A16", "weight_packed", torch.zeros(40, IN // 8, dtype=torch.int32), "has no tensor weight_packed"),
    ],
)
def test_other_variants_are_refused_by_name(
    make_config: Any, tmp_path: Any, kind: str, name: str, tensor: torch.Tensor, words: str
) -> None:
    linear = make(kind, 40, 0)
    bad = Stored(kind, linear.weight, linear.bias, {**linear.stored, name: tensor})
    with pytest.raises(CheckpointError) as error:
        make_config(proj=bad)
    assert f"m.proj.{name}" in str(error.value)
    assert words in str(error.value)
    assert str(error.value).partition(" (and ")[0] in list(header_findings(CheckpointReader(tmp_path)))
