# SPDX-License-Identifier: Apache-2.0
"""Sums of products over all calibration tokens, divided among the devices."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import DevicePool

TOKENS_AT_ONCE = 4096

Factors = Callable[[Tensor, slice], tuple[Tensor, ...]]


@dataclass(frozen=True)
class GroupInput:
    """The calibration input of a group of linear layers.

    Attributes:
        x: [tokens, input_size], wherever activations are kept.
        token_weights: [tokens], with mean 1, on the first device.
        devices: on which sums are computed.
    """

    x: Tensor
    token_weights: Tensor
    devices: DevicePool

    def __len__(self) -> int:
        return len(self.x)

    def products(self, factors: Factors) -> list[Tensor]:
        """Sums over all tokens of a' b, a' c, ...

        Args:
            factors: (a, b, c, ...) from the tokens of a slice, on one of the devices, and the slice.
        """
        sums: list[dict[int, Tensor]] = [{} for _ in self.devices.devices]

        def add(part: slice, position: int) -> None:
            first, *others = factors(self.x[part].to(self.devices.devices[position]), part)
            for i, other in enumerate(others):
                if i not in sums[position]:
                    sums[position][i] = torch.zeros(first.shape[1], other.shape[1], device=first.device)
                sums[position][i].addmm_(first.t(), other)

        for _ in self.devices.map(add, token_slices(len(self.x))):
            pass
        results = list(sums[0].values())
        for found in sums[1:]:
            for result, other in zip(results, found.values(), strict=False):  # a device may have had no slice
                result += other.to(result)
        return results

    def moment(self) -> Tensor:
        """E[token_weight * x' x], [input_size, input_size]."""
        (moment,) = self.products(lambda x, part: (x * self.token_weights[part, None].to(x), x))
        return moment.div_(len(self))

    def energy(self) -> Tensor:
        """E[token_weight * x^2], [input_size]."""
        (energy,) = self.products(lambda x, part: (self.token_weights[part, None].to(x), x.square()))
        return energy[0].div_(len(self))


def token_slices(tokens: int) -> list[slice]:
    """Slices of the tokens that are worked on at once."""
    return [slice(start, start + TOKENS_AT_ONCE) for start in range(0, tokens, TOKENS_AT_ONCE)]


def weight_moment(weight: Tensor) -> Tensor:
    """W' W, [input_size, input_size], for W [output_size, input_size]."""
    return weight.t() @ weight
