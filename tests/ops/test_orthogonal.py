# SPDX-License-Identifier: Apache-2.0
"""Hadamard and other flat orthogonal matrices."""

import pytest
import torch

from vllm_w4a4_plugin.ops.orthogonal import flat_orthogonal, random_flat_orthogonal


@pytest.mark.parametrize("n", [*range(1, 41), 48, 64, 80, 86, 128, 160])
def test_flat_orthogonal_is_orthogonal(n: int) -> None:
    matrix = flat_orthogonal(n)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 76, 80, 160])
def test_hadamard_orders_have_entries_of_one_magnitude(n: int) -> None:
    assert torch.allclose(flat_orthogonal(n).abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


def test_random_rotations_differ_by_seed_and_repeat() -> None:
    first, again, other = (random_flat_orthogonal(24, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
