# SPDX-License-Identifier: Apache-2.0
"""Linears that begin with a norm or with SiLU. `test_instruction_sets.py` runs this file for every instruction set."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import api, reference, steps

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPSILON = 1e-5
TOKENS = [1, 2, 3, 16, 17, 70, 300]
FACTORS = [(12, 16), (7, 11), (24, 24), (72, 80)]
"""Kronecker factors; with the last, the threads share the transform of one token."""


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(factors: tuple[int, int]) -> tuple[Tensor, ...]:
    """What follows x: a weight that hands each int4 activation to an output of its own, scales and a transform."""
    features = factors[0] * factors[1]
    rows = torch.randperm(features, generator=torch.Generator().manual_seed(1))[:256]
    weight = torch.zeros(len(rows), features, dtype=torch.int8)
    weight[torch.arange(len(rows)), rows] = 1
    left, right = (random(n, n) / n**0.5 for n in factors)
    return ops.pack_int4(weight), torch.ones(len(rows)), left, right, torch.tensor([0.9])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16), (17, 1025), (300, 96), (4, 2560)], ids=str)
@pytest.mark.parametrize("norm", [steps.rms_norm, reference.rms_norm], ids=["kernel", "reference"])
def test_norm(norm: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = (random(2, *shape) * 3).to(dtype)
    weight = (random(shape[-1]).abs() + 0.5).to(dtype)
    for is_sum in (False, True):
        total = x.double() + residual.double() if is_sum else x.double()
        expected = total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
        updated = residual.clone()
        found = norm(x, updated if is_sum else None, weight, EPSILON)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * ROUNDING[dtype], atol=1e-7)
        assert torch.equal(updated, total.to(dtype) if is_sum else residual)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_the_same_bits_as_two_operators(factors: tuple[int, int], dtype: torch.dtype) -> None:
    features, arguments = factors[0] * factors[1], linear(factors)
    norm_weight = (random(features).abs() + 0.5).to(dtype)
    for tokens in TOKENS:
        x, residual = (random(2, tokens, features) * 3).to(dtype)
        gate_up = (random(tokens, 2 * features) * 2).to(dtype)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for is_sum in (False, True):
                one, two = (residual.clone() if is_sum else None for _ in range(2))
                expected = api.flatquant_linear(steps.rms_norm(x, one, norm_weight, EPSILON), *arguments)
                assert expected.isfinite().all()
                assert torch.equal(steps.norm_flatquant_linear(x, two, norm_weight, EPSILON, *arguments), expected)
                assert not is_sum or torch.equal(one, two)
            expected = api.flatquant_linear(api.silu_and_mul(gate_up), *arguments)
            assert torch.equal(steps.silu_flatquant_linear(gate_up, *arguments), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_offsets_bias_and_wide_activations(bits: int) -> None:
    x, residual, norm_weight = random(5, 192), random(5, 192), random(192)
    weight = ops.pack_int4(torch.randint(-8, 8, (33, 192), dtype=torch.int8))
    arguments = (weight, random(33, 4).abs(), random(12, 12), random(16, 16), torch.tensor([0.9]), random(33))
    options = {"weight_offset": random(33, 4), "activation_bits": bits}
    normed = steps.rms_norm(x, residual.clone(), norm_weight, EPSILON)
    found = steps.norm_flatquant_linear(x, residual.clone(), norm_weight, EPSILON, *arguments, **options)
    assert torch.equal(found, api.flatquant_linear(normed, *arguments, **options))
    gate_up = torch.cat([x, residual], -1)
    expected = api.flatquant_linear(api.silu_and_mul(gate_up), *arguments, **options)
    assert torch.equal(steps.silu_flatquant_linear(gate_up, *arguments, **options), expected)


@pytest.mark.parametrize("place", [0, 5, 191])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad: float, place: int) -> None:
    arguments, weight = linear((12, 16)), torch.ones(192)
    for operator, width in (
        (lambda x: steps.norm_flatquant_linear(x, torch.zeros_like(x), weight, EPSILON, *arguments), 192),
        (lambda x: steps.silu_flatquant_linear(x, *arguments), 384),
    ):
        x = random(3, width)
        good = operator(x)
        x[1, place] = bad
        found = operator(x)
        assert found[1].isnan().all()
        assert torch.equal(found[::2], good[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_eager_give_the_same_bits(dtype: torch.dtype) -> None:
    """aot_eager makes the update of the residual functional, as torch.compile does."""
    arguments = linear((12, 16))
    norm_weight = random(192).to(dtype)
    x, residual = random(2, 17, 192).to(dtype)

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = steps.norm_flatquant_linear(x, residual, norm_weight, EPSILON, *arguments)
        z = steps.silu_flatquant_linear(torch.cat([x, residual], -1), *arguments)
        return y, steps.rms_norm(torch.cat([y, z], -1)[:, :192].contiguous(), residual, norm_weight, EPSILON)

    ops.load_library()
    residuals = residual.clone(), residual.clone()
    expected = block(x, residuals[0])
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(x, residuals[1])
    assert all(map(torch.equal, found, expected))
    assert torch.equal(*residuals)
    assert not torch.equal(residuals[0], residual)


def test_wrong_arguments_are_named() -> None:
    arguments, x, weight = linear((12, 16)), random(3, 192), torch.ones(192)
    norm = partial(steps.norm_flatquant_linear, x)
    with pytest.raises(RuntimeError, match=r"norm_weight: expected 192 values of x's dtype, found \[191\]"):
        norm(None, weight[:191].clone(), EPSILON, *arguments)
    with pytest.raises(RuntimeError, match=r"norm_weight: expected 192 values of x's dtype"):
        norm(None, weight.bfloat16(), EPSILON, *arguments)
    with pytest.raises(
        RuntimeError, match=r"residual: expected the dtype and shape of x, \[3, 192\], found \[2, 192\]"
    ):
        norm(x[:2].clone(), weight, EPSILON, *arguments)
    with pytest.raises(RuntimeError, match="x: expected gate and up of equal sizes side by side"):
        steps.silu_flatquant_linear(random(3, 7), *arguments)
