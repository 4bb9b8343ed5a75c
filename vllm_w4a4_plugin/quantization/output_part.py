# SPDX-License-Identifier: Apache-2.0
"""Row-parallel layers on CPUs, shared out by output features instead of input features.

A sum over ranks of partial products depends on how many ranks there are: floats are added in another order, and a scale
that belongs to a whole token is known to no rank. Here each rank gathers whole tokens, computes some of the outputs as
one rank would, and gives zeros for the others. vLLM's sum over the ranks is then exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OutputPart:
    """The output features of a row-parallel layer that one rank computes.

    Attributes:
        first: the first of them.
        count: how many.
        total: those of the whole layer.
    """

    first: int
    count: int
    total: int

    @classmethod
    def of_rank(cls, rank: int, ranks: int, total: int) -> "OutputPart":
        """That of one of `ranks` ranks; their counts differ by at most one."""
        first, end = total * rank // ranks, total * (rank + 1) // ranks
        return cls(first, end - first, total)

    @property
    def weight_loader(self) -> Callable[[Any, torch.Tensor], None]:
        """In place of vLLM's, which gives a rank its input features: fills a parameter from this part's rows."""

        def load(param: Any, loaded_weight: torch.Tensor) -> None:
            param.load_rows(loaded_weight, self.first, self.total)

        return load

    def bias(self, layer: Any) -> torch.Tensor | None:
        """The part's values of the bias that the layer itself adds. vLLM passes the whole bias, to rank 0 only."""
        if layer.bias is None or layer.skip_bias_add:
            return None
        return layer.bias.narrow(0, self.first, self.count)

    def among_all(self, y: torch.Tensor) -> torch.Tensor:
        """[..., total] with `y` [..., count] in its place and zeros elsewhere."""
        return torch.nn.functional.pad(y, (self.first, self.total - self.first - self.count))
