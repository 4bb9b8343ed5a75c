# SPDX-License-Identifier: Apache-2.0
"""Quantization of one decoder block, group by group, each fed with the quantized outputs of those before it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..activations import Activations
from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Group, Role
from .fold import fold_into_source, has_foldable_source
from .forward import BlockForward
from .group import quantize_group
from .moments import GroupInput
from .plan import BlockPlan
from .quantized import QuantizedGroup
from .report import LayerReport, report_float, report_quantized
from .storage import StoredLinear, collect_tensors, stored_linears

LOSS_ROWS = 2


@dataclass
class BlockResult:
    """A quantized block.

    Attributes:
        tensors: as stored, by full name.
        types: quant type by full name, in the same order.
        hidden: the quantized block's output [rows, length, hidden], float32.
        reports: one per linear layer.
        loss: relative error of what the block adds to the residual stream.
    """

    tensors: dict[str, Tensor]
    types: dict[str, QuantType]
    hidden: Tensor
    reports: list[LayerReport]
    loss: float


class BlockQuantizer:
    """Quantizes one block.

    Args:
        block: changed in place.
        hidden: its input [rows, length, hidden], float32: the output of the quantized blocks before it.
        plan: what to do.
        devices: share the work.
        activations: allocates what is as large as the calibration text.
    """

    def __init__(
        self, block: LoadedBlock, hidden: Tensor, plan: BlockPlan, devices: DevicePool, activations: Activations
    ) -> None:
        self.block, self.hidden, self.plan = block, hidden, plan
        self.devices, self.activations = devices, activations
        self.forward = BlockForward(block, hidden, devices, activations)

    @torch.no_grad()
    def run(self, progress: Callable[[str], None] = lambda step: None) -> BlockResult:
        """Quantize the groups in order of execution; `progress` is told which."""
        sample = slice(None, None, max(1, len(self.hidden) // LOSS_ROWS))
        first = self.hidden[sample].to(self.block.device)
        exact = (self.block.run(first) - first).cpu()
        for role in (Role.O, Role.DOWN):
            group = self.block.groups[role]
            if has_foldable_source(group, self.plan.types[role]):
                fold_into_source(self.block, group, self._input(group), self.plan)
        linears: dict[str, StoredLinear] = {}
        reports: list[LayerReport] = []
        for role, group in self.block.groups.items():
            progress(f"{role}")
            if not self.plan.types[role].spec.is_quantized:
                reports += report_float(self.block, group)
                continue
            inputs = self._input(group)
            quantized = quantize_group(self.block, group, inputs, self.plan)
            self._store_outputs(group, inputs, quantized)
            stored = stored_linears(self.block, group, self.plan.types[role], quantized)
            reports += report_quantized(self.block, group, inputs.x, quantized, stored)
            linears |= stored
        output = self.forward.output()
        loss = ((output[sample] - self.hidden[sample] - exact).norm() / exact.norm()).item()
        tensors, types = collect_tensors(self.block, linears)
        return BlockResult(tensors, types, output, reports, loss)

    def _input(self, group: Group) -> GroupInput:
        x = self.forward.input_of(group)
        weights = self.plan.token_weights(group.role)
        if weights is None:
            weights = torch.ones(len(x))
        return GroupInput(x, weights.to(self.block.device), self.devices)

    def _store_outputs(self, group: Group, inputs: GroupInput, quantized: QuantizedGroup) -> None:
        """Let the group's layers return their quantized outputs from now on."""
        sizes = self.block.output_sizes(group)
        outputs = [self.activations.empty(len(inputs), size) for size in sizes]
        weights = [quantized.dequantized().t().to(device) for device in self.devices.devices]

        def multiply(part: slice, position: int) -> Tensor:
            device = self.devices.devices[position]
            return quantized.input.to(device)(inputs.x[part].to(device)) @ weights[position]

        for part, result in zip(inputs.slices(), self.devices.map(multiply, inputs.slices()), strict=True):
            for output, columns in zip(outputs, result.split(sizes, 1), strict=True):
                output[part] = columns
        for name, output in zip(group.linears, outputs, strict=True):
            bias = self.block.linear(name).bias
            if bias is not None:
                output += bias.to(output)
            self.forward.store_output(name, output)
