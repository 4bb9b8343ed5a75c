# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against arithmetic written out in another way."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.ops import reference

small = st.integers(1, 7)


@given(small, small, st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_transform_is_a_kronecker_product(left: int, right: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, left * right, dtype=torch.float64, generator=generator)
    left_trans = torch.randn(left, left, dtype=torch.float64, generator=generator)
    right_trans = torch.randn(right, right, dtype=torch.float64, generator=generator)
    expected = x @ torch.kron(left_trans, right_trans)
    torch.testing.assert_close(reference.kronecker_transform(x, left_trans, right_trans), expected)
    one_sided = x @ torch.kron(left_trans, torch.eye(right, dtype=torch.float64))
    torch.testing.assert_close(reference.kronecker_transform(x, left_trans, None), one_sided)
    other_side = x @ torch.kron(torch.eye(left, dtype=torch.float64), right_trans)
    torch.testing.assert_close(reference.kronecker_transform(x, None, right_trans), other_side)


def test_quantization_by_hand() -> None:
    q, scale = reference.quantize_tokens(torch.tensor([[7.0, -7.0, 3.5, 2.5, 0.0], [0.0] * 5]), 1.0)
    assert q.tolist() == [[7, -7, 4, 2, 0], [0] * 5]  # 3.5 and 2.5 are ties and go to the even neighbour
    assert scale.tolist() == [1.0, 0.0]
    q, scale = reference.quantize_tokens(torch.tensor([[14.0, -14.0, 1.0]]), 0.5)
    assert q.tolist() == [[7, -8, 1]]  # clipping keeps -8
    assert scale.tolist() == [1.0]


def test_tokens_that_are_not_finite_by_hand() -> None:
    nan, inf, smallest = float("nan"), float("inf"), 2.0**-149
    x = torch.tensor([[1.0, nan], [-inf, 2.0], [inf, nan], [3.5, -7.0], [smallest * 3, smallest], [smallest * 10, 0.0]])
    q, scale = reference.quantize_tokens(x, 1.0)
    assert scale[:3].isnan().all()
    assert scale[3:].tolist() == [1.0, 0.0, smallest]  # 3 / 7 and 10 / 7 of the smallest float32
    assert q.tolist() == [[0, 0], [0, 0], [0, 0], [4, -7], [0, 0], [7, 0]]
    q, scale = reference.quantize_tokens(torch.tensor([[190 * smallest, 0.0], [-inf, 1.0]]), 1.0, -127, 127)
    assert q.tolist() == [[127, 0], [0, 0]]
    assert scale[0] == smallest
    y = reference.int4_linear(
        torch.ones(2, 4), torch.tensor([nan, 1.0]), torch.ones(3, 4), torch.ones(3), torch.ones(3)
    )
    assert y[0].isnan().all()
    assert y[1].tolist() == [5.0] * 3


def test_linear_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (3, 16), dtype=torch.int8, generator=generator)
    weight = torch.randint(-8, 8, (5, 16), dtype=torch.int8, generator=generator)
    scale, weight_scale = torch.rand(3, generator=generator), torch.rand(5, 2, generator=generator)
    offset, bias = torch.rand(5, 2, generator=generator), torch.rand(5, generator=generator)
    y = reference.int4_linear(q, scale, weight, weight_scale, bias, offset)
    for t in range(3):
        for o in range(5):
            total = 0.0
            for k in range(16):
                total += (
                    float(q[t, k]) * (float(weight[o, k]) - float(offset[o, k // 8])) * float(weight_scale[o, k // 8])
                )
            assert abs(float(scale[t]) * total + float(bias[o]) - float(y[t, o])) < 1e-4


def test_npu_roundings_stay_near_the_exact_result() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 192, generator=generator).bfloat16()
    left, right = torch.randn(12, 12, generator=generator), torch.randn(16, 16, generator=generator)
    q, scale = reference.kronecker_quant(x, left, right, 0.9)
    q_npu, scale_npu = reference.kronecker_quant_npu(x, left, right, 0.9)
    assert (q.int() - q_npu.int()).abs().max() <= 1
    assert (q != q_npu).float().mean() < 0.05
    torch.testing.assert_close(scale, scale_npu, rtol=0.02, atol=0)


def test_npu_zero_token() -> None:
    q, scale = reference.kronecker_quant_npu(torch.zeros(2, 12), torch.eye(3), torch.eye(4))
    assert not q.any()
    assert not scale.any()


def test_npu_tokens_that_are_not_finite() -> None:
    """None of their outputs is finite; the other tokens are as without them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 192, generator=generator).bfloat16()
    left, right = torch.randn(12, 12, generator=generator), torch.randn(16, 16, generator=generator)
    weight = torch.randint(-8, 8, (24, 192), dtype=torch.int8, generator=generator)
    args = (weight, torch.rand(24, generator=generator), left, right, 0.9, torch.randn(24, generator=generator))
    clean = reference.flatquant_linear_npu(x, *args)
    # NaN, infinities, and a value that is finite in bfloat16 but not in float16.
    for token, value in ((0, float("nan")), (1, float("inf")), (3, -float("inf")), (5, 1e30)):
        x[token, 30 * token] = value
    y = reference.flatquant_linear_npu(x, *args)
    assert not y[[0, 1, 3, 5]].isfinite().any()
    assert y[0].isnan().all()
    assert torch.equal(y[[2, 4]], clean[[2, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factors", [(None, None), (16, None), (None, 24), (16, 24)])
@pytest.mark.parametrize("function", [reference.kronecker_quant_fused, reference.unfused_quant_npu])
def test_npu_roundings_are_the_formula_up_to_16_bits(function: Any, factors: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (size and torch.randint(-2, 3, (size, size), generator=generator).float() for size in factors)
    x = torch.randint(-9, 10, (20, 384), generator=generator).to(dtype)
    for clip_ratio in (1.0, 0.95):
        q, scale = function(x, left, right, clip_ratio)
        expected, expected_scale = reference.kronecker_quant(x.float(), left, right, clip_ratio)
        torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
        # X R is rounded to the dtype, which moves few activations by a step of a 4-bit grid.
        assert (q - expected).abs().max() <= 1
        assert (q != expected).float().mean() < 0.03


def test_npu_roundings_at_the_ends() -> None:
    x = torch.tensor([[14.0, -14.0, 1.0, 3.0], [0.0] * 4]).bfloat16()
    q, scale = reference.kronecker_quant_fused(x, None, None, 0.5)
    assert q.tolist() == [[7, -8, 1, 3], [0] * 4]
    assert scale.tolist() == [1.0, 0.0]
    q, scale = reference.unfused_quant_npu(x, None, None, 0.5)
    assert q.tolist() == [[7, -7, 1, 3], [0] * 4]  # the clamp loses -8
    assert scale.tolist() == [1.0, 0.0]
