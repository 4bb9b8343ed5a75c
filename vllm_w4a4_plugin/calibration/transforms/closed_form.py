# SPDX-License-Identifier: Apache-2.0
"""The transform of a group of linear layers in closed form.

With T = diag(d) kron(L, R), activations become x T and weights W T^-T. The error of rounding the activations to 4 bits
is proportional to tr(T' Sx T), the energy that is rounded, times tr(T^-1 Sw T^-T), the energy by which the weights
multiply it; the error of rounding the weights is proportional to the same product. Here Sx = E[x' x], and Sw = W' W
over all rows of the group. The product depends on L and R only through P = L L' and Q = R R', and while the other is
fixed, each of P and Q has the closed-form minimiser A^-1 # B, the matrix geometric mean. This leaves an orthogonal H
free in L = P^(1/2) H; a flat one is chosen, so that no coordinate of a token stands out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.ops.orthogonal import random_flat_orthogonal

from .sizes import FactorSizes

ROUNDS = 6
RIDGE = 1e-4  # of the mean eigenvalue: keeps Sx^-1 finite in directions that the calibration text does not cover
SLAB_ENTRIES = 2**23  # entries of a second moment that are converted to float64 at a time
MAX_STEP = 4.0  # largest factor by which one round changes an entry of d


@dataclass(frozen=True)
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
        sx, sw: [n, n], second moments of the inputs and of the weight rows, in float32.
        sizes: of the factors.
        generator: draws the flat rotations.
        fit_diagonal: otherwise d = 1.
        fit_right: otherwise R = I.
        tied: [n] class numbers; entries of d in the same class are equal.
    """
    x, w = _Moment(sx, sizes), _Moment(sw, sizes)
    p = torch.eye(sizes.left, dtype=torch.float64)
    q = torch.eye(sizes.right, dtype=torch.float64)
    d = torch.ones(len(sx), dtype=torch.float64)
    if fit_diagonal:
        d = _tie((w.diagonal / x.diagonal).pow(0.25), tied)
    for _ in range(ROUNDS):
        q_inverse = torch.linalg.inv(q)
        p = _unit(geometric_mean(x.trace_right(d, q), w.trace_right(1 / d, q_inverse)))
        p_inverse = torch.linalg.inv(p)
        if fit_right:
            q = _unit(geometric_mean(x.trace_left(d, p), w.trace_left(1 / d, p_inverse)))
        if fit_diagonal:
            d = _fit_diagonal(d, x.damped(p, q), w.damped(p_inverse, torch.linalg.inv(q)), tied)
    left = _power(p, 0.5) @ random_flat_orthogonal(sizes.left, generator)
    right = _power(q, 0.5) @ random_flat_orthogonal(sizes.right, generator) if fit_right else q
    return Transform(d, left, right)


class _Moment:
    """A second moment [n, n] with a ridge, read in float64 a slab of rows at a time: a whole copy may not fit.

    Row indices split into (i, k) and column indices into (j, l), with i and j over the left factor.
    """

    def __init__(self, moment: Tensor, sizes: FactorSizes) -> None:
        self.moment, self.sizes = moment, sizes
        diagonal = moment.diagonal().double().cpu()
        self.ridge = (RIDGE * diagonal.mean()).clamp_min(1e-30)
        self.diagonal = diagonal + self.ridge

    def _slabs(self, d: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of i, and diag(d) S diag(d) for them as [i, k, j, l]."""
        m, n = self.sizes.left, self.sizes.right
        step = max(1, SLAB_ENTRIES // (n * m * n))
        for start in range(0, m, step):
            stop = min(start + step, m)
            slab = self.moment[start * n : stop * n].to("cpu", torch.float64, copy=True)
            slab.diagonal(start * n).add_(self.ridge)
            if d is not None:
                slab.mul_(d[start * n : stop * n, None]).mul_(d)
            yield slice(start, stop), slab.view(stop - start, n, m, n)

    def trace_right(self, d: Tensor, q: Tensor) -> Tensor:
        """[M, M]: sum over k, l of (d S d)[ik, jl] q[k, l]."""
        return _symmetric(torch.cat([torch.einsum("ikjl,kl->ij", slab, q) for _, slab in self._slabs(d)]))

    def trace_left(self, d: Tensor, p: Tensor) -> Tensor:
        """[N, N]: sum over i, j of (d S d)[ik, jl] p[i, j]."""
        total = torch.zeros(self.sizes.right, self.sizes.right, dtype=torch.float64)
        for rows, slab in self._slabs(d):
            total += torch.einsum("ikjl,ij->kl", slab, p[rows])
        return _symmetric(total)

    def damped(self, p: Tensor, q: Tensor) -> Tensor:
        """S * kron(p, q), entry by entry, [n, n] in the moment's own dtype."""
        result = torch.empty_like(self.moment, device="cpu")
        for rows, slab in self._slabs():
            slab.mul_(p[rows][:, None, :, None]).mul_(q[:, None, :])
            result[rows.start * len(q) : rows.stop * len(q)] = slab.view(-1, len(result))
        return result


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """A^-1 # B for positive definite A, B: the P with P A P = B, minimiser of tr(P A) tr(P^-1 B) up to scale."""
    half, inverse_half = _power(a, 0.5), _power(a, -0.5)
    mean = inverse_half @ _power(half @ b @ half, 0.5) @ inverse_half
    return (mean + mean.t()) / 2


def _fit_diagonal(d: Tensor, s: Tensor, v: Tensor, tied: Tensor | None) -> Tensor:
    """Fixed-point steps for min (d' S d)(e' V e), e = 1/d: at the minimum the shares of both sides are equal."""
    for _ in range(4):
        e = 1 / d
        share_x, share_w = d * (s @ d.to(s)).to(d), e * (v @ e.to(v)).to(d)
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


def _symmetric(s: Tensor) -> Tensor:
    return (s + s.t()) / 2


def _unit(p: Tensor) -> Tensor:
    return p / torch.linalg.slogdet(p).logabsdet.div(len(p)).exp()


def _power(s: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp_min(values[-1].abs() * 1e-12).pow(exponent)) @ vectors.t()
