# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer after quantization, and how large their errors are."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .nearest import relative_error
from .quantized import QuantizedGroup
from .storage import StoredLinear


class ErrorSum:
    """Mean errors of gate, up and down over all experts and their tokens."""

    def __init__(self) -> None:
        self.sums, self.tokens = [0.0, 0.0, 0.0], [0, 0, 0]

    def add(self, projection: int, error: float, tokens: int) -> None:
        """Note the mean error of a projection for some tokens."""
        self.sums[projection] += error * tokens
        self.tokens[projection] += tokens

    def measure(self, group: QuantizedGroup, weight: Tensor, x: Tensor, projections: tuple[int, ...]) -> None:
        """Note the errors of the projections that `weight` consists of, for inputs x [tokens, input_size]."""
        if not len(x):
            return
        parts = (product.chunk(len(projections), 1) for product in (group.output(x), x @ weight.t()))
        for projection, found, exact in zip(projections, *parts, strict=True):
            self.add(projection, relative_error(found, exact), len(x))

    def total(self) -> float:
        """The sum of the means of all projections that were measured."""
        return sum(self.mean(projection) or 0.0 for projection in range(3))

    def copy(self) -> "ErrorSum":
        """The same, to which others can be added."""
        result = ErrorSum()
        result.sums, result.tokens = list(self.sums), list(self.tokens)
        return result

    def mean(self, projection: int) -> float | None:
        """None if no token was measured."""
        return self.sums[projection] / self.tokens[projection] if self.tokens[projection] else None


@dataclass(frozen=True)
class QuantizedExperts:
    """The experts of one layer.

    Attributes:
        linears: by their names in the block.
        plain, found: errors, rounded to nearest without a transform and as quantized.
        factors: sizes of the transforms of gate and up, and of down.
        rounded: numbers of the experts whose gate and up were rounded to nearest since that was better, and of those
            whose down was.
        unreached: numbers of the experts that no token for statistics goes to.
    """

    linears: Mapping[str, StoredLinear]
    plain: ErrorSum
    found: ErrorSum
    factors: list[list[int]]
    rounded: list[list[int]]
    unreached: list[int]
