# SPDX-License-Identifier: Apache-2.0
"""Sizes and products of the two Kronecker factors of a transform."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes

NPU_MULTIPLE = 8  # aclnnFlatQuant: N % 8 == 0
NPU_MAXIMUM = 256  # aclnnFlatQuant: M, N <= 256


@dataclass(frozen=True)
class FactorSizes:
    """Sizes of left_trans [left, left] and right_trans [right, right]; left * right = input features."""

    left: int
    right: int

    @property
    def fits_npu(self) -> bool:
        """Whether aclnnFlatQuant accepts them."""
        return self.right % NPU_MULTIPLE == 0 and max(self.left, self.right) <= NPU_MAXIMUM


def factor_sizes(n: int) -> FactorSizes:
    """Factor sizes for n input features.

    The official tool's pair where the NPU kernel accepts it (vllm-ascend recomputes that pair and loads no other);
    else the pair with the smallest sum, which is the cheapest transform, among those that the kernel accepts;
    else the tool's pair or, where it has none (n = 2 mod 4), the pair with the smallest sum.
    """
    pairs = [FactorSizes(k, n // k) for k in range(1, n + 1) if n % k == 0]
    try:
        official = FactorSizes(*kronecker_sizes(n))
    except ValueError:
        official = min(pairs, key=lambda p: (p.left + p.right, p.left))
    if official.fits_npu:
        return official
    return min((p for p in pairs if p.fits_npu), key=lambda p: (p.left + p.right, p.left), default=official)


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
    """Factors of the transposed inverse: rows of W become `apply_kronecker(W, *kronecker_inverse(L, R))`."""
    inverse = [None if f is None else torch.linalg.inv(f.double()).t().contiguous() for f in (left, right)]
    return inverse[0], inverse[1]
