# SPDX-License-Identifier: Apache-2.0
"""What is to be done with a block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.structure import Role


def equal_weights(role: Role) -> Tensor | None:
    """Token weights that are all the same."""
    return None


@dataclass(frozen=True)
class BlockPlan:
    """How one block is quantized.

    Attributes:
        types: quant type of each role.
        seed: of the flat rotations.
        token_weights: gives the weights [tokens] of a role's output errors, or None for equal ones; without the tokens
            that are held out.
        held_out: how many rows, at the end of the text, are left out of all statistics. On these, what calibration
            does must be better than rounding to nearest.
        plain: whether everything is rounded to nearest.
    """

    types: Mapping[Role, QuantType]
    seed: int = 0
    token_weights: Callable[[Role], Tensor | None] = equal_weights
    held_out: int = 0
    plain: bool = False

    def generator(self, role: Role, index: int) -> torch.Generator:
        """For the flat rotations of a role in block `index`."""
        number = (self.seed * 100_003 + index) * len(Role) + list(Role).index(role)
        return torch.Generator().manual_seed(number)
