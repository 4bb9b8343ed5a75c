# SPDX-License-Identifier: Apache-2.0
"""Kronecker products against dense ones and against the reference operator."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.transforms.kronecker import apply_kronecker, kronecker_inverse
from vllm_w4a4_plugin.ops import reference


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=40)
def test_apply_kronecker_is_the_dense_product_and_the_served_one(m: int, n: int, absent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, m, generator=generator).double(), torch.randn(n, n, generator=generator).double()
    given_left, given_right = (None if absent == 1 else left), (None if absent == 2 else right)
    dense = torch.kron(
        torch.eye(m).double() if given_left is None else left, torch.eye(n).double() if given_right is None else right
    )
    x = torch.randn(3, 2, m * n, generator=generator).double()
    found = apply_kronecker(x, given_left, given_right)
    assert torch.allclose(found, x @ dense)
    assert torch.allclose(found, reference.kronecker_transform(x, given_left, given_right))


def test_kronecker_inverse_keeps_the_product_of_weights_and_activations() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, n, generator=generator).double() + 2 * torch.eye(n) for n in (3, 5))
    x, weight = (torch.randn(rows, 15, generator=generator).double() for rows in (4, 7))
    transformed = apply_kronecker(weight, *kronecker_inverse(left, right))
    assert torch.allclose(apply_kronecker(x, left, right) @ transformed.t(), x @ weight.t())
