# SPDX-License-Identifier: Apache-2.0
"""Several devices that share the work on one block.

Blocks themselves follow one another, as each is fed with what the quantized ones before it put out. Within a block,
tokens are independent in every forward pass and second moment, and rows of a weight in rounding: these are shared.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team:
    """The devices.

    Args:
        devices: the first one also does what is not shared; one may be named twice.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)

    def __len__(self) -> int:
        return len(self.devices)

    def map(self, work: Callable[[Item, int], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results of work(item, member) in the order of the items, which go to the members in turn.

        No gradients are recorded.
        """
        if len(self) == 1:
            for item in items:
                with torch.no_grad():
                    result = work(item, 0)
                yield result
            return
        without_gradients = torch.no_grad()(work)  # grad mode belongs to a thread
        remaining = iter(items)
        with ThreadPoolExecutor(len(self)) as pool:
            while batch := list(islice(remaining, len(self))):
                yield from pool.map(without_gradients, batch, range(len(batch)))
