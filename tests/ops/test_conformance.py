# SPDX-License-Identifier: Apache-2.0
"""The native operators against the reference. `test_instruction_sets.py` runs this file for every instruction set.

int4 activations may differ in at most 1 of 10,000 values, by one step: the float32 sums of the transform are added in
another order. Given equal activations the outputs agree to rounding.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 63, 128, 257, 300]
# left, right, out: square, oblong, odd, primes, one row, one column, a real projection.
SHAPES = [(12, 16, 256), (16, 16, 48), (64, 80, 33), (3, 5, 7), (7, 11, 1), (1, 13, 16), (13, 1, 17), (24, 24, 1536)]


class Case:
    """Random operands of one linear."""

    def __init__(self, left: int, right: int, out: int, tokens: int, dtype: torch.dtype, groups: int = 1) -> None:
        generator = torch.Generator().manual_seed(left * 1000003 + right * 1009 + out * 31 + tokens)
        features = left * right
        self.x = torch.randn(tokens, features, generator=generator).to(dtype)
        self.weight = torch.randint(-8, 8, (out, features), dtype=torch.int8, generator=generator)
        shape = (out,) if groups == 1 else (out, groups)
        self.scale = torch.rand(shape, generator=generator) * 0.1 + 1e-3
        self.offset = torch.randn(shape, generator=generator)
        self.left = torch.randn(left, left, generator=generator) / left**0.5
        self.right = torch.randn(right, right, generator=generator) / right**0.5
        self.bias = torch.randn(out, generator=generator).to(dtype)
        self.packed = ops.pack_int4(self.weight)


def check(case: Case, left: Any, right: Any, clip: float, bias: Any = None, offset: Any = None) -> None:
    q, scale = ops.kronecker_quant(case.x, left, right, clip)
    expected_q, expected_scale = reference.kronecker_quant(case.x, left, right, clip)
    step = (q.int() - expected_q.int()).abs()
    assert step.max() <= 1 if step.numel() else True
    assert step.sum() <= max(1, q.numel() // 10_000)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)

    y = ops.flatquant_linear(case.x, case.packed, case.scale, left, right, clip, bias, weight_offset=offset)
    assert y.dtype == case.x.dtype
    # From the kernel's own activations, so that a flipped one does not hide what the matrix product does.
    expected = reference.int4_linear(q, scale, case.weight, case.scale, bias, offset)
    magnitude = reference.int4_linear(
        q.abs(), scale, case.weight.abs(), case.scale, None if bias is None else bias.abs()
    )
    tolerance = (
        ROUNDING[case.x.dtype] * (expected.abs() if case.x.dtype != torch.float32 else magnitude) + 1e-6 * magnitude
    )
    if offset is not None:
        tolerance += 1e-6 * magnitude.max()
    assert ((y.float() - expected).abs() <= tolerance).all()
    again = ops.int4_linear(q, scale, case.packed, case.scale, bias, offset, case.x.dtype)
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_factors(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for tokens in TOKENS:
        case = Case(*shape, tokens, dtype)
        check(case, case.left, case.right, 0.95, case.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missing_factor_is_the_identity(dtype: torch.dtype) -> None:
    case = Case(12, 16, 40, 9, dtype)
    check(case, case.left, None, 0.9)
    check(case, None, case.right, 0.9)
    check(case, None, None, 0.9)
    same = ops.kronecker_quant(case.x, case.left, torch.eye(16), 0.9)[0]
    assert torch.equal(ops.kronecker_quant(case.x, case.left, None, 0.9)[0], same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 24])
def test_groups_and_offsets(groups: int, dtype: torch.dtype) -> None:
    for tokens in (1, 5, 40):
        case = Case(12, 16, 50, tokens, dtype, groups)
        check(case, None, None, 1.0)
        check(case, None, None, 1.0, case.bias, case.offset)
        check(case, case.left, case.right, 0.8, case.bias, case.offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_zeros_give_the_bias(dtype: torch.dtype) -> None:
    case = Case(12, 16, 40, 4, dtype)
    case.x[1] = 0
    check(case, case.left, case.right, 1.0, case.bias)
    y = ops.flatquant_linear(case.x, case.packed, case.scale, case.left, case.right, 1.0, case.bias)
    assert torch.equal(y[1], case.bias)
    q, scale = ops.kronecker_quant(case.x, case.left, case.right, 1.0)
    assert scale[1] == 0
    assert not q[1].any()


def test_empty_batch() -> None:
    case = Case(12, 16, 40, 0, torch.bfloat16)
    assert ops.flatquant_linear(case.x, case.packed, case.scale, case.left, case.right).shape == (0, 40)
    q, scale = ops.kronecker_quant(case.x, case.left, case.right)
    assert (q.shape, scale.shape) == ((0, 192), (0,))


def test_leading_dimensions_are_kept() -> None:
    case = Case(12, 16, 40, 6, torch.float32)
    flat = ops.flatquant_linear(case.x, case.packed, case.scale, case.left, case.right)
    nested = ops.flatquant_linear(case.x.view(2, 3, 192), case.packed, case.scale, case.left, case.right)
    assert torch.equal(nested, flat.view(2, 3, 40))
    vector = ops.flatquant_linear(case.x[0], case.packed, case.scale, case.left, case.right)
    assert torch.equal(vector, flat[0])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e4, 1e30])
def test_extreme_magnitudes(magnitude: float) -> None:
    case = Case(12, 16, 40, 5, torch.float32)
    case.x *= magnitude
    check(case, case.left, case.right, 0.97)


def test_extreme_weights_and_activations_do_not_overflow() -> None:
    """The largest sums a kernel can meet: all weights -8 or 7, all activations -8 or 7, 25600 features."""
    for weight_value in (-8, 7):
        for q_value in (-8, 7):
            weight = torch.full((16, 25600), weight_value, dtype=torch.int8)
            q = torch.full((9, 25600), q_value, dtype=torch.int8)
            packed = ops.pack_int4(weight)
            for tokens in (1, 9):
                y = ops.int4_linear(q[:tokens], torch.ones(tokens), packed, torch.ones(16), None, None, torch.float32)
                assert (y == weight_value * q_value * 25600).all()


def test_results_do_not_depend_on_threads_or_batch() -> None:
    case = Case(24, 24, 300, 70, torch.float32)
    args = (case.packed, case.scale, case.left, case.right, 0.9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.flatquant_linear(case.x, *args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.flatquant_linear(case.x, *args), one)
    for token in (0, 33, 69):
        assert torch.equal(ops.flatquant_linear(case.x[token : token + 1], *args)[0], one[token])


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 70), st.integers(1, 20), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_any_shape(left: int, right: int, out: int, tokens: int, dtype: torch.dtype) -> None:
    case = Case(left, right, out, tokens, dtype)
    check(case, case.left, case.right, 0.9, case.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "out"), [(192, 256), (77, 33), (8, 1), (1536, 576)])
def test_w8a8(features: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(features + out)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(out, generator=generator), torch.randn(out, generator=generator).to(dtype)
    packed = torch.zeros(ops.packed_int8_shape(out, features), dtype=torch.int8)
    ops.pack_int8_rows_(packed, weight[: out // 2].contiguous(), 0)
    ops.pack_int8_rows_(packed, weight[out // 2 :].contiguous(), out // 2)
    for tokens in (0, 1, 3, 4, 9, 70):
        x = torch.randn(tokens, features, generator=generator).to(dtype)
        y = ops.w8a8_linear(x, packed, scale, bias)
        expected = reference.w8a8_linear(x.float(), weight, scale, bias)
        torch.testing.assert_close(y.float(), expected, rtol=2 * ROUNDING[dtype] + 1e-5, atol=1e-3)


def test_w8a8_is_exact_where_saturating_kernels_fail() -> None:
    weight = torch.full((16, 512), -128, dtype=torch.int8)
    packed = torch.zeros(ops.packed_int8_shape(16, 512), dtype=torch.int8)
    ops.pack_int8_rows_(packed, weight, 0)
    y = ops.w8a8_linear(torch.full((5, 512), -127.0), packed, torch.ones(16))
    assert (y == 128 * 127 * 512).all()
