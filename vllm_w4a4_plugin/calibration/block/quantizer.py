# SPDX-License-Identifier: Apache-2.0
"""Quantization of one decoder block, group by group, each fed with the quantized outputs of those before it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..activations import Activations
from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Experts, Group
from .expert_results import QuantizedExperts
from .experts import ExpertsQuantizer
from .fold import fold_into_source, has_foldable_source
from .forward import ROWS_AT_ONCE, BlockForward
from .guard import guarded_group
from .moments import GroupInput, token_slices
from .nearest import is_larger, relative_error
from .plan import BlockPlan
from .quantized import QuantizedGroup
from .report import (
    LayerReport,
    report_experts,
    report_float,
    report_float_experts,
    report_others,
    report_quantized,
)
from .storage import StoredLinear, collect_tensors, stored_linears

SAMPLE_TOKENS = 1024  # on which errors are measured


@dataclass
class BlockResult:
    """A quantized block.

    Attributes:
        tensors: as stored, by full name.
        types: quant type by full name, in the same order.
        hidden: the quantized block's output [rows, length, hidden], float32.
        reports: one per linear layer, and per projection of experts.
        loss: relative error of what the block adds to the residual stream, on held-out rows if there are any.
    """

    tensors: dict[str, Tensor]
    types: dict[str, QuantType]
    hidden: Tensor
    reports: list[LayerReport]
    loss: float


def quantize_block(
    load: Callable[[], LoadedBlock],
    hidden: Tensor,
    plan: BlockPlan,
    devices: DevicePool,
    activations: Activations,
    progress: Callable[[str], None] = lambda step: None,
) -> BlockResult:
    """Quantize a block; round all of it to nearest if that is better on the held-out rows.

    Groups are compared before, each by itself. But a part of a group's transform may be in the layers before it, whose
    errors it changes: only the whole block shows that.

    Args:
        load: makes the block; called up to three times.
        hidden, plan, devices, activations: as for `BlockQuantizer`.
        progress: told which group is quantized.
    """
    result = BlockQuantizer(load(), hidden, plan, devices, activations).run(progress)
    if not plan.held_out or plan.plain:
        return result
    rounded = replace(plan, plain=True)
    plain = BlockQuantizer(load(), hidden[-plan.held_out :], rounded, devices, activations).run()
    if not is_larger(result.loss, plain.loss):
        return result
    return BlockQuantizer(load(), hidden, rounded, devices, activations).run(progress)


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
        self.tokens = (len(hidden) - plan.held_out) * hidden.shape[1]  # for statistics

    @torch.no_grad()
    def run(self, progress: Callable[[str], None] = lambda step: None) -> BlockResult:
        """Quantize the groups in order of execution; `progress` is told which."""
        rows = slice(-(self.plan.held_out or 1), None)
        exact = self._added(rows)
        unfolded = self._fold()
        linears: dict[str, StoredLinear] = {}
        reports: list[LayerReport] = []
        for key, group in self.block.groups.items():
            progress(key)
            if not self.plan.types[key].spec.is_quantized:
                reports += report_float(self.block, group)
                continue
            x = self.forward.input_of(group)
            sample = self._sample(x)
            inputs = self._inputs(group, x)
            quantized, errors = guarded_group(self.block, group, inputs, sample, self.plan, bool(self.plan.held_out))
            if key in unfolded and group.source and not errors.fallback:
                errors = replace(errors, fallback=f"not folded into {group.source.linear}")
            self._store_outputs(group, x, quantized)
            stored = stored_linears(self.block, group, self.plan.types[key], quantized)
            reports += report_quantized(self.block, group, sample, quantized, stored, errors)
            linears |= stored
        for experts in self.block.experts:
            progress(experts.name)
            if not self.plan.experts[experts.name].spec.is_quantized:
                reports.append(report_float_experts(self.block, experts))
                continue
            quantized_experts = self._quantized(experts)
            reports += report_experts(self.block, experts, quantized_experts)
            linears |= quantized_experts.linears
        reports += report_others(self.block)
        output = self.forward.output()
        loss = relative_error(output[rows] - self.hidden[rows], exact)
        tensors, types = collect_tensors(self.block, linears)
        return BlockResult(tensors, types, output, reports, loss)

    def _quantized(self, experts: Experts) -> QuantizedExperts:
        """Quantize experts; their module returns what they give then from now on."""
        routed = self.forward.input_of_experts(experts)
        output = self.activations.empty(*routed.x.shape).zero_()
        quantizer = ExpertsQuantizer(self.block, experts, routed, self.tokens, self.plan, self.devices, output)
        quantized = quantizer.run()
        self.forward.store_output(experts.name, output)
        return quantized

    def _added(self, rows: slice) -> Tensor:
        """What the float block adds to some rows of its input."""
        parts = [h.to(self.block.device) for h in self.hidden[rows].split(ROWS_AT_ONCE)]
        return torch.cat([(self.block.run(part) - part).cpu() for part in parts])

    def _fold(self) -> set[str]:
        """Fold parts of transforms into layers; returns the groups of which nothing could be folded to advantage."""
        unfolded: set[str] = set()
        for key, group in self.block.groups.items():
            if not has_foldable_source(group, self.plan.types[key]):
                continue
            if self.plan.plain:
                unfolded.add(key)
            else:
                x = self.forward.input_of(group)
                held_out = self._sample(x) if self.plan.held_out else None
                if not fold_into_source(self.block, group, self._inputs(group, x), self.plan, held_out):
                    unfolded.add(key)
        return unfolded

    def _sample(self, x: Tensor) -> Tensor:
        """Inputs [tokens, input_size] on which errors are measured: held out if any are."""
        candidates = x[self.tokens :] if self.plan.held_out else x
        step = -(-len(candidates) // SAMPLE_TOKENS)
        return candidates[::step].to(self.block.device)

    def _inputs(self, group: Group, x: Tensor) -> GroupInput:
        """The inputs of statistics, of all inputs [tokens, input_size] of a group."""
        x = x[: self.tokens]
        weights = None if self.plan.plain else self.plan.token_weights(group.key)
        if weights is None:
            weights = torch.ones(len(x))
        return GroupInput(x, weights.to(self.block.device), self.devices)

    def _store_outputs(self, group: Group, x: Tensor, quantized: QuantizedGroup) -> None:
        """Let the group's layers return their quantized outputs for inputs [tokens, input_size] from now on."""
        sizes = self.block.output_sizes(group)
        outputs = [self.activations.empty(len(x), size) for size in sizes]
        weights = [quantized.dequantized().t().to(device) for device in self.devices.devices]

        def multiply(part: slice, position: int) -> Tensor:
            device = self.devices.devices[position]
            return quantized.input.to(device)(x[part].to(device)) @ weights[position]

        parts = token_slices(len(x))
        for part, result in zip(parts, self.devices.map(multiply, parts), strict=True):
            for output, columns in zip(outputs, result.split(sizes, 1), strict=True):
                output[part] = columns
        for name, output in zip(group.linears, outputs, strict=True):
            bias = self.block.linear(name).bias
            if bias is not None:
                output += bias.to(output)
            self.forward.store_output(name, output)
