# SPDX-License-Identifier: Apache-2.0
"""Products with a Kronecker-factored transform, differentiable and in any float dtype.

`ops.reference.kronecker_transform` is the same product, kept apart: tests compare this one with it.
"""

import torch
from torch import Tensor


def apply_kronecker(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x @ kron(left, right) for x [..., M * N]; None is the identity (its size follows from the other factor)."""
    if left is None and right is None:
        return x
    m = left.shape[0] if left is not None else x.shape[-1] // right.shape[0]  # type: ignore[union-attr]
    y = x.reshape(-1, m, x.shape[-1] // m)
    if right is not None:
        y = y @ right
    if left is not None:
        y = torch.matmul(left.t(), y)
    return y.reshape(x.shape)


def kronecker_inverse(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Factors of the transposed inverse, in float64.

    Rows of a weight W become `apply_kronecker(W, *kronecker_inverse(left, right))`.
    """
    inverse = [None if f is None else torch.linalg.inv(f.double()).t().contiguous() for f in (left, right)]
    return inverse[0], inverse[1]
