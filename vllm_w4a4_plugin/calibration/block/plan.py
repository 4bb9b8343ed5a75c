# SPDX-License-Identifier: Apache-2.0
"""What is to be done with a block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.structure import Group, Role

SEEDS_APART = 2**48  # of groups with the same role in one block
EXPERTS_FROM = 64  # numbers of groups that no block has


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
        experts: quant type of each layer of experts, by the name of its module.
    """

    types: Mapping[str, QuantType]
    seed: int = 0
    token_weights: Callable[[str], Tensor | None] = equal_weights
    held_out: int = 0
    plain: bool = False
    experts: Mapping[str, QuantType] = field(default_factory=dict)

    def generator(self, group: Group, index: int) -> torch.Generator:
        """For the flat rotations of a group of block `index`."""
        return self._seeded(index, group.role, group.number - 1)

    def generator_of_expert(self, expert: int | None, index: int) -> torch.Generator:
        """For those of an expert's down projection in block `index`; None stands for gate and up of all experts."""
        role, number = (Role.GATE_UP, 0) if expert is None else (Role.DOWN, expert)
        return self._seeded(index, role, EXPERTS_FROM + number)

    def _seeded(self, index: int, role: Role, number: int) -> torch.Generator:
        first = (self.seed * 100_003 + index) * len(Role) + list(Role).index(role)
        return torch.Generator().manual_seed(first + number * SEEDS_APART)
