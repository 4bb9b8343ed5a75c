# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a block on the whole calibration text, while its linear layers are being quantized."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..activations import Activations
from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Group

ROWS_AT_ONCE = 4


class BlockForward:
    """A block and its input. Linear layers that are quantized already return their stored outputs.

    Args:
        block: run from its current state.
        hidden: its input [rows, length, hidden], float32.
        devices: share the rows.
        activations: allocates results.
    """

    def __init__(self, block: LoadedBlock, hidden: Tensor, devices: DevicePool, activations: Activations) -> None:
        self.block, self.hidden, self.devices, self.activations = block, hidden, devices, activations
        self._outputs: dict[str, Tensor] = {}

    def output(self) -> Tensor:
        """The block's output [rows, length, hidden]."""
        return self._run(until=None)

    def input_of(self, group: Group) -> Tensor:
        """The group's input [tokens, input_size]."""
        return self._run(group.linears[0]).flatten(0, 1)

    def store_output(self, name: str, output: Tensor) -> None:
        """From now on, linear layer `name` returns `output` [tokens, output_size]."""
        self._outputs[name] = output.view(*self.hidden.shape[:2], -1)

    def _run(self, until: str | None) -> Tensor:
        """The block's output, or the input of linear layer `until`, for all rows."""
        replicas = self._replicas()
        starts = range(0, len(self.hidden), ROWS_AT_ONCE)

        length = self.hidden.shape[1]

        def run(start: int, position: int) -> Tensor:
            rows = self.hidden[start : start + ROWS_AT_ONCE].to(self.devices.devices[position])
            outputs = {name: output[start : start + ROWS_AT_ONCE] for name, output in self._outputs.items()}
            with _replaying(replicas[position], outputs, until):
                try:
                    return self.block.run(rows, replicas[position])
                except _Reached as reached:
                    return reached.input.reshape(len(rows), length, -1)  # a mixture's block has no rows

        results = torch.empty(0)
        for start, result in zip(starts, self.devices.map(run, starts), strict=True):
            if not start:
                results = self.activations.empty(*self.hidden.shape[:2], result.shape[-1])
            results[start : start + len(result)] = result
        return results

    def _replicas(self) -> list[nn.Module]:
        """One module per device, none of them used twice."""
        module = self.block.module
        replicas = [
            module if device == self.block.device else copy.deepcopy(module).to(device)
            for device in self.devices.devices
        ]
        if len(set(map(id, replicas))) < len(replicas):  # a device is listed twice
            replicas = [copy.deepcopy(module) for _ in replicas]
        return replicas


@contextmanager
def _replaying(block: nn.Module, outputs: Mapping[str, Tensor], until: str | None) -> Iterator[None]:
    """Inside, linear layers in `outputs` return those, and `until` raises `_Reached` with its input."""
    modules = {name: block.get_submodule(name) for name in outputs}
    forwards = {name: module.forward for name, module in modules.items()}
    hook = block.get_submodule(until).register_forward_pre_hook(_stop) if until else None
    try:
        for name, module in modules.items():
            module.forward = partial(_stored_output, outputs[name])
        yield
    finally:
        for name, module in modules.items():
            module.forward = forwards[name]
        if hook:
            hook.remove()


def _stored_output(output: Tensor, x: Tensor) -> Tensor:
    return output.to(x).reshape(*x.shape[:-1], -1)


class _Reached(Exception):
    def __init__(self, value: Tensor) -> None:
        self.input = value


def _stop(module: nn.Module, args: tuple[Tensor]) -> None:
    raise _Reached(args[0])
