# SPDX-License-Identifier: Apache-2.0
"""Quantization of the routed experts of a block, one expert at a time.

Gate and up of all experts share their input, and so one transform and one activation clip. Each down projection has
its own. There is no diagonal: the norm before the experts also feeds the router.

Few tokens go to some experts. The moments that their weights are rounded with therefore count `PRIOR_TOKENS` tokens
more: for gate and up average tokens of the whole text, for down tokens with equal and independent channels. An expert
that no token goes to is rounded to nearest.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import QuantType

from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Experts
from ..transforms.closed_form import closed_form
from ..transforms.sizes import factor_sizes
from .expert_results import ErrorSum, QuantizedExperts
from .forward import RoutedInput
from .group import activation_clip, calibrated, is_calibrated, quantized_moments
from .moments import GroupInput, weight_moment
from .nearest import IDENTITY, is_larger, nearest, relative_error
from .plan import BlockPlan
from .quantized import InputQuantizer, InputTransform, QuantizedGroup, inversely_transformed
from .storage import StoredLinear, layer_tensors

PRIOR_TOKENS = 256
JUDGED_TOKENS = 256  # of each expert, on which errors are measured

Moments = tuple[Tensor, Tensor]
"""Per token: Xq' Xq and Xq' X of quantized and exact inputs."""
Errors = tuple[ErrorSum, ErrorSum]
"""Rounded to nearest without a transform, and as quantized."""
Rounded = tuple[QuantizedGroup, bool]
"""A matrix of an expert, and whether it is rounded to nearest."""


class ExpertsQuantizer:
    """Quantizes the experts of one layer.

    Args:
        block: to which they belong.
        experts: which.
        inputs: what they receive, with the layers before them quantized.
        tokens: how many of the tokens are for statistics; the others are held out.
        plan: of the block.
        devices: share the work.
        output: zeros [tokens, hidden], to which what the experts give is added.
    """

    def __init__(
        self,
        block: LoadedBlock,
        experts: Experts,
        inputs: RoutedInput,
        tokens: int,
        plan: BlockPlan,
        devices: DevicePool,
        output: Tensor,
    ) -> None:
        self.block, self.experts, self.inputs, self.tokens = block, experts, inputs, tokens
        self.plan, self.devices, self.output = plan, devices, output
        self.type: QuantType = plan.experts[experts.name]
        self.kind = self.type.spec
        self.calibrates = is_calibrated(self.kind) and not plan.plain
        self.counts = [int((inputs.ids[:tokens] == expert).sum()) for expert in range(experts.count)]

    @torch.no_grad()
    def run(self) -> QuantizedExperts:
        """Quantize gate and up, then down of each expert with what its quantized gate and up give."""
        gate_up, errors = self._gate_and_up(self._input_quantizer())
        linears: dict[str, StoredLinear] = {}
        factors: list[list[int]] = [_factor_sizes(gate_up[0][0].input.transform), []]
        rounded: list[list[int]] = [[], []]
        unreached = [expert for expert, count in enumerate(self.counts) if not count]
        for expert, (both, is_nearest) in enumerate(gate_up):
            every, weights = self.inputs.tokens_of(expert)
            hidden = self._hidden(both, every)
            down, is_down_nearest = self._down(expert, hidden, every < self.tokens, errors)
            for numbers, is_rounded in zip(rounded, (is_nearest, is_down_nearest), strict=True):
                if is_rounded and is_calibrated(self.kind) and self.counts[expert]:
                    numbers.append(expert)
            factors[1] = _factor_sizes(down.input.transform)
            for name, part in zip(self.experts.linears(expert), _parts(both, down), strict=True):
                linears[name] = StoredLinear(self.type, layer_tensors(self.type, *part))
            if len(every):
                self.output.index_add_(0, every, (down.output(hidden) * weights[:, None].to(hidden)).cpu())
        return QuantizedExperts(linears, *errors, factors, rounded, unreached)

    def _weight(self, expert: int) -> Tensor:
        """Gate and up of an expert in one matrix."""
        return torch.cat([self.block.linear(name).weight for name in self.experts.linears(expert)[:2]])

    def _input_quantizer(self) -> InputQuantizer:
        """Of what gate and up of all experts receive."""
        kind, n = self.kind, self.inputs.x.shape[1]
        if not self.calibrates:
            return InputQuantizer(kind.activation_bits, self._identity(n))
        if not kind.has_transform:
            return InputQuantizer(kind.activation_bits)
        inputs, moment = self._all_inputs(), torch.zeros(n, n, device=self.block.device)
        for expert, count in enumerate(self.counts):
            moment += weight_moment(self._weight(expert)) * (max(count, 1) / len(self.inputs.x))
        generator = self.plan.generator_of_expert(None, self.block.index)
        transform = _transform(inputs.moment(), moment, generator, self.block.device)
        inverse = inversely_transformed(inversely_transformed(moment, transform).t(), transform)
        return InputQuantizer(
            kind.activation_bits, transform, activation_clip(transform, inverse, inputs, kind.activation_bits)
        )

    def _gate_and_up(self, quantizer: InputQuantizer) -> tuple[list[Rounded], Errors]:
        """Gate and up of every expert, and their errors.

        If that is better, all of them are rounded to nearest, without a transform.
        """
        errors = ErrorSum(), ErrorSum()
        prior = quantized_moments(quantizer, self._all_inputs()) if self.calibrates else None
        result = []
        for expert in range(self.experts.count):
            weight, judged = self._weight(expert), self.inputs.x[self._judged(expert)].to(self.block.device)
            transformed = inversely_transformed(weight, quantizer.transform)
            simple = replace(nearest(transformed, self.kind), input=quantizer)
            group, is_nearest = simple, True
            inputs = self._stat_inputs(expert)
            if prior is not None and len(inputs):
                group, is_nearest = self._rounded(weight, quantizer, inputs, prior, simple, judged)
            self._measure(weight, group, judged, (0, 1), errors)
            result.append((_compact(group), is_nearest))
        if not self.calibrates or not self.plan.held_out or not is_larger(errors[1].total(), errors[0].total()):
            return result, errors
        identity = self._identity(self.inputs.x.shape[1])
        again = [_compact(nearest(self._weight(expert), self.kind, identity)) for expert in range(self.experts.count)]
        return [(group, True) for group in again], (errors[0], errors[0].copy())

    def _down(self, expert: int, hidden: Tensor, for_statistics: Tensor, errors: Errors) -> Rounded:
        """The down projection of an expert.

        Args:
            expert: its number.
            hidden: its inputs [tokens, intermediate].
            for_statistics: [tokens], which of them are not held out.
            errors: get its errors.
        """
        kind, weight = self.kind, self.block.linear(self.experts.linears(expert)[2]).weight
        judged = (hidden[~for_statistics] if self.plan.held_out else hidden)[:JUDGED_TOKENS]
        inputs = self._group_input(hidden[for_statistics])
        simple = nearest(weight, kind, self._identity(weight.shape[1]))
        group, is_nearest = simple, True
        if self.calibrates and len(inputs):
            transform, clip = InputTransform(), 1.0
            if kind.has_transform:
                moment = _with_prior(inputs.moment(), _independent(inputs.x), len(inputs))
                generator = self.plan.generator_of_expert(expert, self.block.index)
                transform = _transform(moment, weight_moment(weight), generator, self.block.device)
                moved = weight_moment(inversely_transformed(weight, transform))
                clip = activation_clip(transform, moved, inputs, kind.activation_bits)
            prior = _independent(transform(inputs.x))
            quantizer = InputQuantizer(kind.activation_bits, transform, clip)
            group, is_nearest = self._rounded(weight, quantizer, inputs, (prior, prior), simple, judged)
        self._measure(weight, group, judged, (2,), errors)
        return group, is_nearest

    def _rounded(
        self,
        weight: Tensor,
        quantizer: InputQuantizer,
        inputs: GroupInput,
        prior: Moments,
        simple: QuantizedGroup,
        judged: Tensor,
    ) -> Rounded:
        """A matrix of an expert rounded with care, or to nearest if that is better on held-out tokens.

        Args:
            weight: [output_size, input_size].
            quantizer: of the input.
            inputs: for statistics.
            prior: the moments of the tokens that are added.
            simple: the matrix rounded to nearest.
            judged: inputs on which the two are compared if they are held out.
        """
        own = quantized_moments(quantizer, inputs)
        hessian, cross = (_with_prior(o, p, len(inputs)) for o, p in zip(own, prior, strict=True))
        transformed = inversely_transformed(weight, quantizer.transform)
        group = calibrated(transformed, quantizer, hessian, cross, self.kind.weight_bits, self.devices)
        if not self.plan.held_out or not len(judged):
            return group, False
        exact = judged @ weight.t()
        found, nearby = (relative_error(candidate.output(judged), exact) for candidate in (group, simple))
        return (simple, True) if is_larger(found, nearby) else (group, False)

    def _measure(
        self, weight: Tensor, group: QuantizedGroup, judged: Tensor, projections: tuple[int, ...], errors: Errors
    ) -> None:
        """Note the errors of a matrix, rounded to nearest without a transform and as it is quantized."""
        for total, measured in zip(errors, (nearest(weight, self.kind), group), strict=True):
            total.measure(measured, weight, judged, projections)

    def _hidden(self, both: QuantizedGroup, tokens: Tensor) -> Tensor:
        """silu(gate) * up [tokens, intermediate] of an expert, as it is quantized."""
        x = self.inputs.x[tokens].to(self.block.device)
        gate, up = both.output(x).chunk(2, 1)
        return nn.functional.silu(gate) * up

    def _identity(self, size: int) -> InputTransform:
        """Identity matrices for the factors that layers of this type store."""
        if not self.kind.has_transform:
            return IDENTITY
        sizes = factor_sizes(size)
        left, right = (torch.eye(n, device=self.block.device) for n in (sizes.left, sizes.right))
        return InputTransform(None, left, right)

    def _judged(self, expert: int) -> Tensor:
        """Tokens of an expert on which errors are measured: held out if any are."""
        tokens, _ = self.inputs.tokens_of(expert)
        if self.plan.held_out:
            tokens = tokens[tokens >= self.tokens]
        return tokens[:JUDGED_TOKENS]

    def _stat_inputs(self, expert: int) -> GroupInput:
        tokens, _ = self.inputs.tokens_of(expert)
        return self._group_input(self.inputs.x[tokens[tokens < self.tokens]])

    def _all_inputs(self) -> GroupInput:
        return self._group_input(self.inputs.x[: self.tokens])

    def _group_input(self, x: Tensor) -> GroupInput:
        return GroupInput(x, torch.ones(len(x), device=self.block.device), self.devices)


def _transform(moment: Tensor, weights: Tensor, generator: torch.Generator, device: torch.device) -> InputTransform:
    found = closed_form(moment, weights, factor_sizes(len(moment)), generator, fit_diagonal=False)
    return InputTransform(None, found.left.float().to(device), found.right.float().to(device))


def _with_prior(own: Tensor, prior: Tensor, tokens: int) -> Tensor:
    """The mean over `tokens` tokens and `PRIOR_TOKENS` others."""
    return (own * tokens + prior * PRIOR_TOKENS) / (tokens + PRIOR_TOKENS)


def _independent(x: Tensor) -> Tensor:
    """The moment [n, n] of tokens with the mean energy of x [tokens, n], and equal and independent channels."""
    return x.square().mean().clamp_min(1e-30) * torch.eye(x.shape[1], device=x.device)


def _compact(group: QuantizedGroup) -> QuantizedGroup:
    """The same with a byte for each code and without the weights: those of all experts are in memory at once."""
    return replace(group, weight=torch.empty(0), codes=group.codes.to(torch.int8))


def _parts(both: QuantizedGroup, down: QuantizedGroup) -> Iterator[tuple[Tensor, Tensor, InputQuantizer]]:
    """Codes, scales and input quantizer of gate, up and down."""
    for codes, scale in zip(both.codes.chunk(2), both.scale.chunk(2), strict=True):
        yield codes, scale, both.input
    yield down.codes, down.scale, down.input


def _factor_sizes(transform: InputTransform) -> list[int]:
    return [len(factor) for factor in (transform.left, transform.right) if factor is not None]
