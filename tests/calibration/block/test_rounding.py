# SPDX-License-Identifier: Apache-2.0
"""Rounding against the plugin's reference operator and against direct solutions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.block.rounding import (
    GPTQ_DAMPING,
    absmax_scale,
    best_activation_clip,
    best_weight_scale,
    coordinate_descent,
    gptq,
    quantize_tokens,
    refit,
    round_to_nearest,
)
from vllm_w4a4_plugin.ops.reference import kronecker_quant


@given(st.integers(0, 1000), st.sampled_from([0.6, 0.75, 0.9, 1.0]))
@settings(max_examples=30)
def test_quantize_tokens_is_the_served_operator(seed: int, clip: float) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * 10 ** torch.arange(-3.0, 2)[:, None]
    codes, scale = kronecker_quant(x, None, None, torch.tensor([clip]))
    assert torch.allclose(quantize_tokens(x, clip), codes.float() * scale.reshape(-1, 1), rtol=1e-5, atol=0)


def test_zero_token_stays_zero() -> None:
    assert torch.equal(quantize_tokens(torch.zeros(2, 8), 0.8), torch.zeros(2, 8))


def correlated(tokens: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator) + (
        0.1 * torch.randn(tokens, n, generator=generator)
    )


def test_gptq_beats_rounding_to_nearest_and_stays_in_range() -> None:
    x, weight = correlated(400, 160), torch.randn(20, 160, generator=torch.Generator().manual_seed(4))
    scale = absmax_scale(weight, 4)
    codes, nearest = gptq(weight, scale, x.t() @ x / 400), round_to_nearest(weight, scale, 4)
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 7
    error = [((c * scale - weight) @ x.t()).norm() for c in (codes, nearest)]
    assert error[0] < 0.5 * error[1]


def column_by_column(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """GPTQ as its paper's formula (3) has it: one column, then the rest by the inverse of what is left of H."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w, left = weight.double().clone(), order.tolist()
    h = hessian.double() + torch.eye(len(hessian)).double() * damping * hessian.diagonal().double().mean()
    codes = torch.zeros_like(w)
    for column in order.tolist():
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, column] = (w[:, column] / scale[:, 0]).round().clamp(-7, 7)
        error = (w[:, column] - codes[:, column] * scale[:, 0]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


def test_gptq_is_its_formula() -> None:
    x = correlated(400, 160).double()
    weight = torch.randn(9, 160, generator=torch.Generator().manual_seed(4)).double()
    scale, hessian = absmax_scale(weight, 4), x.t() @ x / 400
    assert torch.equal(gptq(weight, scale, hessian), column_by_column(weight, scale, hessian, GPTQ_DAMPING))


@pytest.mark.parametrize("n", [128, 300])  # one block of columns, and more than one
def test_descent_lowers_the_error_and_ends_where_no_single_code_helps(n: int) -> None:
    x = correlated(500, n).double()
    weight = torch.randn(4, n, generator=torch.Generator().manual_seed(n)).double()
    hessian, scale = x.t() @ x / 500, absmax_scale(weight, 4)

    def error(codes: torch.Tensor) -> torch.Tensor:
        difference = codes * scale - weight
        return torch.einsum("...i,ij,...j->...", difference, hessian, difference)

    start = gptq(weight, scale, hessian)
    few, many = (coordinate_descent(start, weight, scale, hessian, sweeps=sweeps) for sweeps in (1, 40))
    assert (error(few) <= error(start) * (1 + 1e-9)).all()
    assert error(few).sum() < 0.98 * error(start).sum()
    assert torch.equal(many, many.round())
    assert many.abs().max() <= 7
    steps = torch.cat([torch.eye(n), -torch.eye(n)]).double()
    neighbours = (many + steps[:, None]).clamp(-7, 7)
    assert (error(neighbours) >= error(many) * (1 - 1e-9)).all()


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    scale = absmax_scale(weight, 4)
    assert torch.equal(gptq(weight, scale, torch.eye(32)), round_to_nearest(weight, scale, 4))


def test_refit_solves_the_ridge_problem() -> None:
    x = correlated(300, 16).double()
    xq, weight = quantize_tokens(x, 0.8), torch.randn(4, 16).double()
    ridge = 0.02 * (xq.t() @ xq).diagonal().mean()
    # The same problem as one least-squares system: the ridge is 16 more equations V = W.
    rows = torch.cat([xq, ridge.sqrt() * torch.eye(16).double()])
    targets = torch.cat([x @ weight.t(), ridge.sqrt() * weight.t()])
    expected = torch.linalg.lstsq(rows, targets).solution.t()
    assert torch.allclose(refit(weight, xq.t() @ xq, xq.t() @ x), expected, atol=1e-8)


def test_clips_are_the_best_of_their_grids() -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 6
    moment, ones = torch.eye(32), torch.ones(200)
    clip = best_activation_clip(x, moment, ones)
    chosen = (quantize_tokens(x, clip) - x).norm()
    assert chosen <= min((quantize_tokens(x, c) - x).norm() for c in (0.6, 0.7, 0.8, 0.9, 1.0)) + 1e-6
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) ** 3
    scale = best_weight_scale(weight, torch.ones(64))
    assert (round_to_nearest(weight, scale, 4) * scale - weight).norm() < (
        round_to_nearest(weight, absmax_scale(weight, 4), 4) * absmax_scale(weight, 4) - weight
    ).norm()
