# SPDX-License-Identifier: Apache-2.0
"""8-bit activations, int8 weights with a transform or a quant_bias, and float activations, against the reference."""

from typing import Any

import pytest
import torch

from tests.linears import relative_error
from vllm_w4a4_plugin import ops

OUT, LEFT, RIGHT = 40, 12, 16
FEATURES = LEFT * RIGHT
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 2**-8


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    packed = torch.zeros(ops.packed_int8_shape(*weight.shape), dtype=torch.int8)
    ops.pack_int8_rows_(packed, weight, 0)
    return packed


TRANSFORM = (random(LEFT, LEFT), random(RIGHT, RIGHT), torch.tensor([0.9]))


@DTYPES
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_int4_weights_and_8_bit_activations(dtype: torch.dtype, groups: int, tokens: int) -> None:
    x, weight = random(tokens, FEATURES).to(dtype), integers(-8, 8, OUT, FEATURES)
    scale, offset, bias = random(OUT, groups).abs(), random(OUT, groups), random(OUT)
    packed, keywords = ops.pack_int4(weight), {"weight_offset": offset, "activation_bits": 8}
    expected = ops.reference.flatquant_linear(x, weight, scale, *TRANSFORM[:2], 0.9, bias, **keywords)
    found = ops.flatquant_linear(x, packed, scale, *TRANSFORM, bias, **keywords)
    assert relative_error(found, expected) < tolerance(dtype)
    q, token_scale = ops.kronecker_quant(x, *TRANSFORM, activation_bits=8)
    assert int(q.abs().max()) == 127
    halves = ops.int4_linear(q, token_scale, packed, scale, bias, offset, dtype, activation_bits=8)
    assert relative_error(halves, expected) < tolerance(dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_int8_weights_with_a_transform(dtype: torch.dtype, tokens: int) -> None:
    x, weight = random(tokens, FEATURES).to(dtype), integers(-128, 128, OUT, FEATURES)
    scale, bias = random(OUT).abs() / 100, random(OUT)
    expected = ops.reference.w8a8_linear(x, weight, scale, bias, *TRANSFORM[:2], 0.9)
    assert relative_error(ops.w8a8_linear(x, pack_int8(weight), scale, bias, *TRANSFORM), expected) < tolerance(dtype)


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_integer_sums_are_exact_over_the_whole_range(tokens: int) -> None:
    q, weight = integers(-128, 128, tokens, FEATURES), integers(-128, 128, OUT, FEATURES)
    q[0], weight[0] = -128, -128
    quant_bias = torch.arange(OUT, dtype=torch.int32) * -(10**6)
    expected = (q.long() @ weight.long().T + quant_bias).float()
    ones = torch.ones(max(tokens, OUT))
    found = ops.int8_linear(q, ones[:tokens], pack_int8(weight), ones[:OUT], None, quant_bias, torch.float32)
    assert torch.equal(found, expected)


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_float_activations(dtype: torch.dtype, bits: int, groups: int, tokens: int) -> None:
    x, weight = random(tokens, FEATURES).to(dtype), integers(-(2 ** (bits - 1)), 2 ** (bits - 1), OUT, FEATURES)
    scale, offset, bias = random(OUT, groups).abs(), 3 * random(OUT, groups), random(OUT)
    packed = ops.pack_int4(weight) if bits == 4 else pack_int8(weight)
    expected = ops.reference.weight_only_linear(x, weight, scale, bias, offset)
    assert relative_error(ops.weight_only_linear(x, packed, scale, bias, offset), expected) < tolerance(dtype)


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    x, q, ones = random(3, FEATURES).to(dtype), integers(-9, 9, 3, FEATURES), torch.ones(OUT)
    int4, int8 = ops.pack_int4(integers(-8, 8, OUT, FEATURES)), pack_int8(integers(-128, 128, OUT, FEATURES))
    namespace, bias = torch.ops.vllm_w4a4, torch.ones(OUT, dtype=torch.int32)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (namespace.flatquant_linear, (x, int4, ones, *TRANSFORM, None, None, 8)),
        (namespace.kronecker_quant, (x, *TRANSFORM, 8)),
        (namespace.int4_linear, (q, ones[:3], int4, ones, None, None, dtype, 8)),
        (namespace.int8_linear, (q, ones[:3], int8, ones, None, bias, dtype)),
        (namespace.w8a8_linear, (x, int8, ones, None, *TRANSFORM)),
        (namespace.weight_only_linear, (x, int4, ones, ones)),
        (namespace.weight_only_linear, (x, int8, ones)),
    ]
    for operator, args in calls:
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_are_named() -> None:
    q, ones, int8 = integers(-9, 9, 3, FEATURES), torch.ones(OUT), pack_int8(integers(-9, 9, OUT, FEATURES))
    with pytest.raises(RuntimeError, match="activation_bits: expected 4 or 8, found 5"):
        ops.kronecker_quant(random(3, FEATURES), None, None, activation_bits=5)
    with pytest.raises(RuntimeError, match=r"quant_bias: expected int32 \[40\]"):
        ops.int8_linear(q, ones[:3], int8, ones, None, ones, torch.float32)
    with pytest.raises(RuntimeError, match="weight_scale: expected one value per output feature, found 2"):
        ops.int8_linear(q, ones[:3], int8, torch.ones(OUT, 2), None, None, torch.float32)
    with pytest.raises(RuntimeError, match="weight_packed: expected int8 or uint8"):
        ops.weight_only_linear(random(3, FEATURES), int8.flatten(), ones)
