# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a block on the whole calibration text, while its linear layers are being quantized."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..activations import Activations
from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Experts, Group

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class RoutedInput:
    """What the experts of a layer receive.

    Attributes:
        x: [tokens, hidden].
        ids, weights: [tokens, top k], the experts of each token and how much each counts.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Numbers of the tokens that go to an expert, in ascending order, and the expert's weight for each."""
        tokens, places = (self.ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, places]


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

    def input_of_experts(self, experts: Experts) -> RoutedInput:
        """What experts receive, and from which router."""
        routed: dict[int, tuple[Tensor, ...]] = {}
        x = self._run(experts.name, routed)
        ids, weights = (torch.cat([routed[start][i] for start in sorted(routed)]) for i in range(2))
        return RoutedInput(x.flatten(0, 1), ids, weights.float())

    def store_output(self, name: str, output: Tensor) -> None:
        """From now on, linear layer `name`, or module of experts, returns `output` [tokens, output_size]."""
        self._outputs[name] = output.view(*self.hidden.shape[:2], -1)

    def _run(self, until: str | None, others: dict[int, tuple[Tensor, ...]] | None = None) -> Tensor:
        """The block's output, or the input of module `until`, for all rows.

        Args:
            until: name of the module, None for the output.
            others: gets the further arguments of `until`, by the number of the first row.
        """
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
                    if others is not None:
                        others[start] = tuple(value.cpu() for value in reached.others)
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
    """Inside, modules in `outputs` return those, and `until` raises `_Reached` with its input."""
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


def _stored_output(output: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    return output.to(x).reshape(*x.shape[:-1], -1)


class _Reached(Exception):
    def __init__(self, value: Tensor, *others: Tensor) -> None:
        self.input, self.others = value, others


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(*args)
