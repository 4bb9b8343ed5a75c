# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite, and the ends of the dtypes' ranges: the contract in `ops.api`, for every operator.

`test_instruction_sets.py` runs this file for every instruction set; the reference is held to the same contract.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.test_conformance import DTYPES, ROUNDING, Case
from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import reference

NOT_FINITE = [math.nan, -math.nan, math.inf, -math.inf]
Linear = Callable[[Case, Tensor], Tensor]


def flatquant(case: Case, x: Tensor) -> Tensor:
    args = (case.left, case.right, 0.9, case.bias)
    return ops.flatquant_linear(x, case.packed, case.scale, *args, weight_offset=case.offset)


def untransformed(case: Case, x: Tensor) -> Tensor:
    return ops.flatquant_linear(x, case.packed, case.scale, None, None, 1.0, case.bias)


def in_two_steps(case: Case, x: Tensor) -> Tensor:
    q, scale = ops.kronecker_quant(x, case.left, case.right, 0.9)
    return ops.int4_linear(q, scale, case.packed, case.scale, case.bias, case.offset, x.dtype)


def w8a8(case: Case, x: Tensor) -> Tensor:
    packed = torch.zeros(ops.packed_int8_shape(*case.weight.shape), dtype=torch.int8)
    ops.pack_int8_rows_(packed, case.weight, 0)
    return ops.w8a8_linear(x, packed, case.scale, case.bias)


def flatquant_reference(case: Case, x: Tensor) -> Tensor:
    args = (case.left, case.right, 0.9, case.bias)
    return reference.flatquant_linear(x, case.weight, case.scale, *args, weight_offset=case.offset)


def w8a8_reference(case: Case, x: Tensor) -> Tensor:
    return reference.w8a8_linear(x, case.weight, case.scale, case.bias)


LINEARS = [flatquant, untransformed, in_two_steps, w8a8, flatquant_reference, w8a8_reference]
sizes = st.integers(1, 20)


def check_rows(linear: Linear, case: Case, x: Tensor) -> None:
    """The rows of tokens that are not finite are NaN, the others have the bits of a run without those tokens."""
    poisoned = ~x.isfinite().all(-1)
    y, clean = linear(case, x), linear(case, case.x)
    assert y.dtype == x.dtype
    assert y[poisoned].isnan().all()
    assert torch.equal(y[~poisoned].view(torch.uint8), clean[~poisoned].view(torch.uint8))


@pytest.mark.parametrize("linear", LINEARS)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 20), st.sampled_from(DTYPES), st.data())
@settings(deadline=None, max_examples=60)
def test_only_tokens_that_are_not_finite_become_nan(
    linear: Linear, left: int, right: int, out: int, tokens: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = Case(left, right, out, tokens, dtype)
    x = case.x.clone()
    places = st.tuples(st.integers(0, tokens - 1), st.integers(0, left * right - 1), st.sampled_from(NOT_FINITE))
    for token, feature, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        x[token, feature] = value
    check_rows(linear, case, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_compiled_graphs_keep_it_visible(value: float) -> None:
    case = Case(12, 16, 40, 5, torch.bfloat16)
    x = case.x.clone()
    x[3, 77] = value

    def block(x: Tensor) -> Tensor:
        return in_two_steps(case, x * 2) + flatquant(case, x) + w8a8(case, x)

    check_rows(lambda _, x: torch.compile(block, fullgraph=True, dynamic=True)(x), case, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linear", [flatquant, in_two_steps, flatquant_reference])
@pytest.mark.parametrize("has_opposites", [False, True])
def test_a_transform_that_overflows_gives_nan(linear: Linear, dtype: torch.dtype, has_opposites: bool) -> None:
    """To infinity, or to infinity - infinity; the other tokens are zeros, which no finite factor changes."""
    case = Case(12, 16, 40, 3, dtype)
    case.x.zero_()
    case.left = torch.ones(12, 12)
    case.left[::2] = -1.0 if has_opposites else 1.0
    case.right = torch.full((16, 16), 1e35)
    case.x[1] = torch.finfo(dtype).max
    y = linear(case, case.x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], case.bias.expand(2, 40))


@pytest.mark.parametrize("linear", [flatquant, in_two_steps, flatquant_reference])
@pytest.mark.parametrize("factor", ["left", "right"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_makes_all_tokens_nan(linear: Linear, factor: str, value: float) -> None:
    case = Case(7, 11, 40, 4, torch.float32)
    case.x[2] = 0
    getattr(case, factor)[3, 5] = value
    assert linear(case, case.x).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("linear", "operand"),
    [
        *itertools.product(LINEARS, ["scale", "bias"]),
        *((linear, "offset") for linear in (flatquant, in_two_steps, flatquant_reference)),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_feature_that_is_not_finite_stays_alone(
    linear: Linear, dtype: torch.dtype, operand: str, value: float
) -> None:
    case = Case(12, 16, 40, 5, dtype)
    case.x[2] = 0
    clean = linear(case, case.x)
    getattr(case, operand)[17] = value
    y = linear(case, case.x)
    others = torch.arange(40) != 17
    assert torch.equal(y[:, others], clean[:, others])
    if operand == "bias" and not math.isnan(value):
        assert (y[:, 17] == value).all()
    else:
        assert not y[:, 17].isfinite().any()
    assert y[:, 17].isnan().all() or not math.isnan(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_scales(dtype: torch.dtype) -> None:
    """The formula decides: NaN for NaN, and for an infinite scale infinity, or NaN where the sum is 0."""
    case = Case(4, 12, 33, 5, dtype)
    case.weight[20] = 0
    packed = ops.pack_int4(case.weight)
    q, _ = reference.kronecker_quant(case.x, None, None)
    scale = torch.tensor([1.0, math.nan, math.inf, -math.nan, 0.0])
    y = ops.int4_linear(q, scale, packed, case.scale, case.bias, None, dtype)
    expected = reference.int4_linear(q, scale, case.weight, case.scale, case.bias, None, dtype)
    assert y[[1, 3]].isnan().all()
    assert y[2, 20].isnan()
    assert torch.equal(y[4], case.bias)
    torch.testing.assert_close(y, expected, rtol=0.01, atol=1e-3, equal_nan=True)


def smallest_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def tokens_at_the_ends(dtype: torch.dtype) -> Tensor:
    """[tokens, 77]: the largest and the smallest values, alone, in steps and together; zeros of both signs."""
    largest, smallest = torch.finfo(dtype).max, smallest_of(dtype)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (77,), generator=generator) * 2.0 - 1.0
    steps = torch.randint(0, 8, (77,), generator=generator) * signs
    both = signs * smallest
    both[3] = largest
    rows = [signs * largest, steps * (largest / 8), both]
    rows += [signs * smallest * count for count in (1, 3, 4, 10, 63, 64, 190, 1000)]
    rows += [steps * smallest, steps * smallest * 100, signs * 0.0, torch.full((77,), -0.0)]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_the_range_quantize_as_the_formula_says(dtype: torch.dtype) -> None:
    x = tokens_at_the_ends(dtype)
    q, scale = ops.kronecker_quant(x, None, None)
    expected_q, expected_scale = reference.kronecker_quant(x, None, None)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert scale.isfinite().all()
    assert not q[scale == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_scale", [1.0, 1e-6])
def test_outputs_at_the_ends_of_the_range(dtype: torch.dtype, weight_scale: float) -> None:
    """Infinite where the formula is beyond the dtype, never NaN; -0.0 is a zero."""
    x = tokens_at_the_ends(dtype)
    case = Case(1, 77, 40, len(x), dtype)
    case.left = case.right = case.offset = case.bias = None
    case.scale.fill_(weight_scale)
    for native, exact in ((flatquant, flatquant_reference), (w8a8, w8a8_reference)):
        y = native(case, x)
        torch.testing.assert_close(y, exact(case, x), rtol=ROUNDING[dtype] + 1e-6, atol=2 * smallest_of(dtype))
        assert not y.isnan().any()
        assert y.isinf().any() == (weight_scale == 1.0)
        assert not y[-2:].any()


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals to zero")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushed_denormals")
@pytest.mark.parametrize("linear", LINEARS)
def test_flushed_denormals_are_zeros(linear: Linear) -> None:
    """Never divided by a scale that was flushed to zero."""
    case = Case(12, 16, 40, 2, torch.float32)
    case.x = torch.full((2, 192), 1e-40)
    case.x[1] = 3 * torch.finfo(torch.float32).tiny  # its scale is a denormal
    y = linear(case, case.x)
    torch.testing.assert_close(y, case.bias.expand(2, 40))


def test_a_token_is_checked_where_the_threads_share_its_transform() -> None:
    case = Case(72, 80, 16, 1, torch.float32)
    args: tuple[Any, ...] = (case.packed, case.scale, case.left, case.right)
    for feature in (0, 2881, 5759):
        x = case.x.clone()
        x[0, feature] = math.nan
        assert ops.flatquant_linear(x, *args).isnan().all()
