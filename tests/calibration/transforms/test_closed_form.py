# SPDX-License-Identifier: Apache-2.0
"""The closed-form transform against dense linear algebra."""

import pytest
import torch

from vllm_w4a4_plugin.calibration.transforms.closed_form import Transform, closed_form, geometric_mean
from vllm_w4a4_plugin.calibration.transforms.sizes import FactorSizes


def spd(n: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    scales = (torch.randn(n, generator=generator, dtype=torch.float64) * spread / 2).exp()
    return (root @ root.t() / n + 0.05 * torch.eye(n, dtype=torch.float64)) * scales[:, None] * scales


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
