# SPDX-License-Identifier: Apache-2.0
"""Sizes of the two Kronecker factors of a transform. Imports no torch."""

from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes
from vllm_w4a4_plugin.ops.npu.select import kronecker_unsupported_reason

from ..model.structure import Role


@dataclass(frozen=True)
class FactorSizes:
    """Sizes of left_trans [left, left] and right_trans [right, right]; left * right = input_size."""

    left: int
    right: int

    @property
    def fits_npu(self) -> bool:
        """Whether npu_kronecker_quant accepts them."""
        return not kronecker_unsupported_reason(self.left, self.right)


def factor_sizes(input_size: int) -> FactorSizes:
    """Factor sizes for a layer's input size.

    msModelSlim's pair if npu_kronecker_quant accepts it (vllm-ascend recomputes that pair and loads no other).
    Otherwise, among the pairs that it accepts, the one with the smallest sum, which is the cheapest transform. If it
    accepts none, msModelSlim's pair, or where that does not exist (input_size = 2 mod 4), the pair with the smallest
    sum.
    """
    pairs = [FactorSizes(k, input_size // k) for k in range(1, input_size + 1) if input_size % k == 0]
    try:
        official = FactorSizes(*kronecker_sizes(input_size))
    except ValueError:
        official = min(pairs, key=lambda p: (p.left + p.right, p.left))
    if official.fits_npu:
        return official
    return min((p for p in pairs if p.fits_npu), key=lambda p: (p.left + p.right, p.left), default=official)


def stored_factors(role: Role, input_size: int, head_dim: int) -> tuple[int, int | None]:
    """Sizes of the factors that a layer stores: those of `factor_sizes`, but for o only the one over its heads.

    The factor over the head dimension of o is folded into v.
    """
    if role is Role.O:
        return input_size // head_dim, None
    sizes = factor_sizes(input_size)
    return sizes.left, sizes.right
