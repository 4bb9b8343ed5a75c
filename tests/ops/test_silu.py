# SPDX-License-Identifier: Apache-2.0
"""`silu_and_mul` and its reference against the formula in float64."""

import pytest
import torch

from vllm_w4a4_plugin.ops import api, reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative to each value; the 16-bit types round the result once."""


def formula(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16), (1, 1023), (17, 1025), (300, 96), (4, 9728)], ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for found in (api.silu_and_mul(x), reference.silu_and_mul(x)):
        assert found.shape == shape
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), formula(x), rtol=TOLERANCE[dtype], atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, 37, 64 + 5])
def test_what_is_not_finite_stays_visible(bad: float, place: int) -> None:
    x = torch.randn(3, 2 * 64) + 3
    x[1, place] = bad
    found = api.silu_and_mul(x)
    other = torch.ones_like(found, dtype=torch.bool)
    other[1, place % 64] = False
    torch.testing.assert_close(found[other].double(), formula(x)[other], rtol=1e-6, atol=1e-7)
    # silu(-inf) is 0 in the limit, and 0 * inf without one.
    assert not found[1, place % 64].isfinite()


def test_extreme_gates() -> None:
    gate = torch.tensor([[-200.0, -100.0, -88.0, 0.0, 88.0, 200.0]])
    found = api.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=-1))
    torch.testing.assert_close(
        found.double(), formula(torch.cat([gate, torch.ones_like(gate)], -1)), rtol=1e-5, atol=1e-35
    )


def test_gate_and_up_must_be_of_equal_size() -> None:
    with pytest.raises(RuntimeError, match="x: expected gate and up of equal sizes side by side"):
        api.silu_and_mul(torch.randn(3, 7))
