# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices, Kronecker factors and the closed-form transform, against dense linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_w4a4_plugin.calibration.geometry import Transform, closed_form, geometric_mean
from vllm_w4a4_plugin.calibration.hadamard import flat_orthogonal, random_flat_orthogonal
from vllm_w4a4_plugin.calibration.kronecker import FactorSizes, apply_kronecker, factor_sizes, kronecker_inverse


def spd(n: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    scales = (torch.randn(n, generator=generator, dtype=torch.float64) * spread / 2).exp()
    return (root @ root.t() / n + 0.05 * torch.eye(n, dtype=torch.float64)) * scales[:, None] * scales


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


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=40)
def test_apply_kronecker_is_the_dense_product(m: int, n: int, absent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, m, generator=generator).double(), torch.randn(n, n, generator=generator).double()
    given_left, given_right = (None if absent == 1 else left), (None if absent == 2 else right)
    dense = torch.kron(
        torch.eye(m).double() if given_left is None else left, torch.eye(n).double() if given_right is None else right
    )
    x = torch.randn(3, 2, m * n, generator=generator).double()
    assert torch.allclose(apply_kronecker(x, given_left, given_right), x @ dense)


def test_kronecker_inverse_keeps_the_product_of_weights_and_activations() -> None:
    left, right = spd(3, 1), spd(5, 2)
    x, weight = torch.randn(4, 15).double(), torch.randn(7, 15).double()
    transformed = apply_kronecker(weight, *kronecker_inverse(left, right))
    assert torch.allclose(apply_kronecker(x, left, right) @ transformed.t(), x @ weight.t())


def test_geometric_mean_solves_its_equation() -> None:
    a, b = spd(6, 3), spd(6, 4)
    p = geometric_mean(a, b)
    assert torch.allclose(p @ a @ p, b, rtol=1e-8)


def objective(sx: torch.Tensor, sw: torch.Tensor, transform: Transform) -> float:
    dense = transform.diagonal[:, None] * torch.kron(transform.left, transform.right)
    inverse = torch.linalg.inv(dense)
    return (torch.trace(dense.t() @ sx @ dense) * torch.trace(inverse @ sw @ inverse.t())).item()


def test_closed_form_is_a_minimum() -> None:
    sx, sw = spd(24, 5), spd(24, 6)
    generator = torch.Generator().manual_seed(0)
    found = closed_form(sx, sw, FactorSizes(4, 6), generator)
    best = objective(sx, sw, found)
    identity = Transform(torch.ones(24).double(), torch.eye(4).double(), torch.eye(6).double())
    assert best < 0.5 * objective(sx, sw, identity)
    for _ in range(30):  # small changes of any part make it no better than the last fixed-point step left it
        noise = [0.02 * torch.randn(s, generator=generator).double() for s in ((24,), (4, 4), (6, 6))]
        changed = Transform(
            found.diagonal * noise[0].exp(),
            found.left @ torch.matrix_exp(noise[1]),
            found.right @ torch.matrix_exp(noise[2]),
        )
        assert objective(sx, sw, changed) > best * 0.99


def test_closed_form_reaches_the_bound_of_an_unstructured_transform() -> None:
    # With one factor the minimum over all T is known: (sum of square roots of the eigenvalues of Sx Sw)^2.
    sx, sw = spd(8, 7), spd(8, 8)
    found = closed_form(sx, sw, FactorSizes(8, 1), torch.Generator().manual_seed(0), fit_diagonal=False)
    bound = torch.linalg.eigvals(sx @ sw).real.sqrt().sum() ** 2
    assert objective(sx, sw, found) == pytest.approx(bound.item(), rel=1e-2)


def test_tied_diagonal_and_fixed_right_factor() -> None:
    tied = torch.arange(24) // 12 * 6 + torch.arange(24) % 6
    found = closed_form(spd(24, 1), spd(24, 2), FactorSizes(4, 6), torch.Generator(), tied=tied, fit_right=False)
    for number in tied.unique():
        values = found.diagonal[tied == number]
        assert torch.allclose(values, values[:1].expand_as(values))
    assert torch.equal(found.right, torch.eye(6).double())
