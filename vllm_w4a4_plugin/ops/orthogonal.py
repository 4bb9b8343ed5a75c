# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices with entries of nearly equal magnitude: they spread a large value over all coordinates."""

from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def flat_orthogonal(n: int) -> Tensor:
    """An orthogonal float64 [n, n] matrix; Hadamard (all entries +-1/sqrt(n)) for orders that are constructed here.

    These are Sylvester doublings of Paley's two constructions (prime fields only). Other orders get the Kronecker
    product of the largest such matrix and a discrete cosine transform.
    """
    return _hadamard(n) if _has_hadamard(n) else _best_product(n)


def random_flat_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """`flat_orthogonal(n)` with rows and columns permuted and their signs flipped at random; float64 [n, n]."""
    matrix = flat_orthogonal(n)
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(n, generator=generator)
    signs = torch.randint(0, 2, (2, n), generator=generator, dtype=torch.float64) * 2 - 1
    return signs[0][:, None] * matrix[rows][:, columns] * signs[1]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(sqrt(n)) + 1))


def _paley_order(n: int) -> bool:
    return (n % 4 == 0 and _is_prime(n - 1)) or (n % 4 == 0 and n // 2 % 4 == 2 and _is_prime(n // 2 - 1))


def _has_hadamard(n: int) -> bool:
    return n in (1, 2) or _paley_order(n) or (n % 4 == 0 and _has_hadamard(n // 2))


def _hadamard(n: int) -> Tensor:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / sqrt(2)
    if n % 4 == 0 and _has_hadamard(n // 2):
        return torch.kron(_hadamard(2), _hadamard(n // 2))
    return _paley(n)


def _paley(n: int) -> Tensor:
    """Paley's constructions: order q + 1 for a prime q = 3 (mod 4), order 2 (q + 1) for a prime q = 1 (mod 4)."""
    first = _is_prime(n - 1) and n % 4 == 0
    q = n - 1 if first else n // 2 - 1
    squares = {k * k % q for k in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if k in squares else -1.0 for k in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)) % q
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, -1.0 if first else 1.0, chi[index]
    eye = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return (eye + core) / sqrt(n)
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return (torch.kron(core, plus) + torch.kron(eye, minus)) / sqrt(n)


def _best_product(n: int) -> Tensor:
    for k in range(n - 1, 2, -1):
        if n % k == 0 and _has_hadamard(k):
            return torch.kron(_hadamard(k), _cosine(n // k))
    return _cosine(n)


def _cosine(n: int) -> Tensor:
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(pi / n * (k + 0.5) * k[:, None]) * sqrt(2 / n)
    matrix[0] /= sqrt(2)
    return matrix
