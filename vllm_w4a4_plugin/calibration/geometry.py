# SPDX-License-Identifier: Apache-2.0
"""The transform of a group of linear layers in closed form.

With T = diag(d) kron(L, R), activations become x T and weights W T^-T. Rounding the activations to 4 bits costs in
proportion to tr(T' Sx T), the energy that is rounded, times tr(T^-1 Sw T^-T), the energy that the weights multiply it
with; rounding the weights costs in proportion to the same product. Here Sx = E[x' x], Sw = W' W over all rows of the
group. The product depends on L and R only through P = L L' and Q = R R', and for fixed others each of P, Q has the
closed-form minimiser A^-1 # B, the matrix geometric mean. What is left free, L = P^(1/2) H, is an orthogonal H, chosen
flat so that no coordinate of a token stands out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hadamard import random_flat_orthogonal
from .kronecker import FactorSizes

ROUNDS = 6
RIDGE = 1e-4  # of the mean eigenvalue: keeps Sx^-1 finite where the calibration text does not reach
MAX_STEP = 4.0  # largest factor by which one round changes an entry of d


@dataclass
class Transform:
    """x -> (x * diagonal) kron(left, right); all float64.

    Attributes:
        diagonal: [n], folded into what produces the group's input.
        left: [M, M]; right: [N, N].
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor


def closed_form(
    sx: Tensor,
    sw: Tensor,
    sizes: FactorSizes,
    generator: torch.Generator,
    *,
    fit_diagonal: bool = True,
    fit_right: bool = True,
    tied: Tensor | None = None,
) -> Transform:
    """The transform that minimises tr(T' Sx T) tr(T^-1 Sw T^-T).

    Args:
        sx, sw: [n, n], second moments of the inputs and of the weight rows.
        sizes: of the factors.
        generator: draws the flat rotations.
        fit_diagonal: else d = 1. fit_right: else R = I.
        tied: [n] class numbers; entries of d in one class are equal.
    """
    sx, sw = _ridged(sx.double().cpu()), _ridged(sw.double().cpu())
    p = torch.eye(sizes.left, dtype=torch.float64)
    q = torch.eye(sizes.right, dtype=torch.float64)
    d = torch.ones(len(sx), dtype=torch.float64)
    if fit_diagonal:
        d = _tie((sw.diagonal() / sx.diagonal()).pow(0.25), tied)
    shape = (sizes.left, sizes.right, sizes.left, sizes.right)
    for _ in range(ROUNDS):
        x4 = (d[:, None] * sx * d).reshape(shape)
        w4 = (sw / d[:, None] / d).reshape(shape)
        q_inverse = torch.linalg.inv(q)
        p = _unit(geometric_mean(_trace_right(x4, q), _trace_right(w4, q_inverse)))
        p_inverse = torch.linalg.inv(p)
        if fit_right:
            q = _unit(geometric_mean(_trace_left(x4, p), _trace_left(w4, p_inverse)))
        if fit_diagonal:
            d = _fit_diagonal(d, sx * torch.kron(p, q), sw * torch.kron(p_inverse, torch.linalg.inv(q)), tied)
    left = _power(p, 0.5) @ random_flat_orthogonal(sizes.left, generator)
    right = _power(q, 0.5) @ random_flat_orthogonal(sizes.right, generator) if fit_right else q
    return Transform(d, left, right)


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """A^-1 # B for positive definite A, B: the P with P A P = B, minimiser of tr(P A) tr(P^-1 B) up to scale."""
    half, inverse_half = _power(a, 0.5), _power(a, -0.5)
    mean = inverse_half @ _power(half @ b @ half, 0.5) @ inverse_half
    return (mean + mean.t()) / 2


def _fit_diagonal(d: Tensor, s: Tensor, v: Tensor, tied: Tensor | None) -> Tensor:
    """Fixed-point steps for min (d' S d)(e' V e), e = 1/d: at the minimum the shares of both sides are equal."""
    for _ in range(4):
        e = 1 / d
        share_x, share_w = d * (s @ d), e * (v @ e)
        floor = 1e-3 / len(d)
        ratio = (share_w / share_w.sum()).clamp_min(floor) / (share_x / share_x.sum()).clamp_min(floor)
        d = _tie(d * ratio.pow(0.25).clamp(1 / MAX_STEP, MAX_STEP), tied)
    return d


def _tie(d: Tensor, tied: Tensor | None) -> Tensor:
    """d with geometric mean 1, its entries replaced by the geometric mean of their class."""
    logs = d.log()
    if tied is not None:
        sums = torch.zeros(int(tied.max()) + 1, dtype=d.dtype).index_add_(0, tied, logs)
        logs = (sums / torch.bincount(tied))[tied]
    return (logs - logs.mean()).exp()


def _trace_right(s: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("ikjl,kl->ij", s, q)


def _trace_left(s: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("ikjl,ij->kl", s, p)


def _ridged(s: Tensor) -> Tensor:
    s = (s + s.t()) / 2
    return s + torch.eye(len(s), dtype=s.dtype) * (RIDGE * s.diagonal().mean()).clamp_min(1e-30)


def _unit(p: Tensor) -> Tensor:
    return p / torch.linalg.slogdet(p).logabsdet.div(len(p)).exp()


def _power(s: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp_min(values[-1].abs() * 1e-12).pow(exponent)) @ vectors.t()
