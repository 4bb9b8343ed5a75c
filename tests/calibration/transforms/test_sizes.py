# SPDX-License-Identifier: Apache-2.0
"""Sizes of Kronecker factors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.model.structure import Role
from vllm_w4a4_plugin.calibration.transforms.sizes import FactorSizes, factor_sizes, stored_factors


@given(st.integers(1, 6000))
def test_factor_sizes_multiply_and_fit_the_npu_where_any_pair_does(n: int) -> None:
    sizes = factor_sizes(n)
    assert sizes.left * sizes.right == n
    possible = any(n % right == 0 and right % 8 == 0 and n // right <= 256 for right in range(8, 257, 8))
    assert sizes.fits_npu == possible


@pytest.mark.parametrize(
    ("n", "expected"), [(384, (16, 24)), (576, (24, 24)), (4096, (64, 64)), (5120, (64, 80)), (25600, (160, 160))]
)
def test_factor_sizes_are_the_official_ones_where_the_npu_takes_them(n: int, expected: tuple[int, int]) -> None:
    assert factor_sizes(n) == FactorSizes(*expected)


def test_o_stores_the_factor_over_its_heads_only() -> None:
    assert stored_factors(Role.O, 4096, 128) == (32, None)
    assert stored_factors(Role.DOWN, 25600, 128) == (160, 160)
