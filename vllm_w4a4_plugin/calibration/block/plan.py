# SPDX-License-Identifier: Apache-2.0
"""What is to be done with a block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.structure import Group, Role

SEEDS_APART = 2**48  # of groups with the same role in one block


def equal_weights(key: str) -> Tensor | None:
    """Token weights that are all the same."""
    return None


@dataclass(frozen=True)
class BlockPlan:
    """How one block is quantized.

    Attributes:
        types: quant type of each group, by its key.
        seed: of the flat rotations.
        token_weights: gives the weights [tokens] of the output errors of the group with a key, or None for equal ones;
            without the tokens that are held out.
        held_out: how many rows, at the end of the text, are left out of all statistics. On these, what calibration
            does must be better than rounding to nearest.
        plain: whether everything is rounded to nearest.
    """

    types: Mapping[str, QuantType]
    seed: int = 0
    token_weights: Callable[[str], Tensor | None] = equal_weights
    held_out: int = 0
    plain: bool = False

    def generator(self, group: Group, index: int) -> torch.Generator:
        """For the flat rotations of a group of block `index`."""
        number = (self.seed * 100_003 + index) * len(Role) + list(Role).index(group.role)
        return torch.Generator().manual_seed(number + (group.number - 1) * SEEDS_APART)
