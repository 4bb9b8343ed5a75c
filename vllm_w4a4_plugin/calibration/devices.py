# SPDX-License-Identifier: Apache-2.0
"""Devices that share the work on one block.

Blocks run one after another, because each is calibrated on the output of the quantized blocks before it. Within a
block, tokens are independent in every forward pass and second moment, and so are the rows of a weight in rounding:
these are divided among the devices.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from .errors import CalibrationError

Item = TypeVar("Item")
Result = TypeVar("Result")


class DevicePool:
    """A list of devices.

    Args:
        devices: the first one also does all work that is not divided; a device may be listed twice.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)

    @classmethod
    def parse(cls, names: str) -> "DevicePool":
        """The devices of a comma-separated list such as "cuda:0,cuda:1".

        Raises:
            CalibrationError: one of them cannot be used on this machine.
        """
        return cls([_device(name.strip()) for name in names.split(",")])

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def first(self) -> torch.device:
        """The device of all work that is not divided."""
        return self.devices[0]

    def map(self, work: Callable[[Item, int], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results of work(item, position) in the order of the items, which are dealt to the devices in turn.

        `position` is that of the device in `devices`. No gradients are recorded.
        """
        if len(self) == 1:
            for item in items:
                with torch.no_grad():
                    result = work(item, 0)
                yield result
            return
        without_gradients = torch.no_grad()(work)  # grad mode is per thread
        remaining = iter(items)
        with ThreadPoolExecutor(len(self)) as pool:
            while batch := list(islice(remaining, len(self))):
                yield from pool.map(without_gradients, batch, range(len(batch)))


def _device(name: str) -> torch.device:
    try:
        if name.startswith("npu"):
            importlib.import_module("torch_npu")  # makes the device known to torch
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"`device`: {name!r} cannot be used on this machine: {reason}") from None
    return torch.device(name)
