# SPDX-License-Identifier: Apache-2.0
"""Quantization of one group of linear layers: transform, activation clip, refitted weights, codes and scales."""

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint.types import TypeSpec

from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Group
from ..transforms.closed_form import closed_form
from ..transforms.sizes import FactorSizes, factor_sizes
from .fold import fold_into_norm
from .moments import GroupInput, weight_moment
from .nearest import nearest
from .plan import BlockPlan
from .quantized import InputQuantizer, InputTransform, QuantizedGroup, inversely_transformed
from .rounding import (
    best_activation_clip,
    best_weight_scale,
    coordinate_descent,
    gptq,
    quantize_tokens,
    refit,
)

CLIP_TOKENS = 2048


def quantize_group(block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan) -> QuantizedGroup:
    """Codes and scales of a group's weights, and the quantizer of its input.

    Args:
        block: to which the group belongs; a diagonal is folded into its norm.
        group: to quantize.
        inputs: what it receives now, with the layers before it quantized.
        plan: of the block.
    """
    weight, kind = block.weight(group), plan.types[group.key].spec
    if not is_calibrated(kind):
        return nearest(weight, kind)
    transform, clip = InputTransform(), 1.0
    if kind.has_transform:
        transform = _transform(block, group, inputs, plan)
        weight = inversely_transformed(weight, transform)
        clip = activation_clip(transform, weight_moment(weight), inputs, kind.activation_bits)
    quantizer = InputQuantizer(kind.activation_bits, transform, clip)
    return calibrated(weight, quantizer, *quantized_moments(quantizer, inputs), kind.weight_bits, inputs.devices)


def calibrated(
    weight: Tensor, quantizer: InputQuantizer, hessian: Tensor, cross: Tensor, bits: int, devices: DevicePool
) -> QuantizedGroup:
    """Weights refitted to the quantized input Xq, then rounded under the Hessian of the error.

    Args:
        weight: [output_size, input_size], transformed.
        quantizer: of the input.
        hessian, cross: the second moments Xq' Xq and Xq' X [input_size, input_size].
        bits: of the weights.
        devices: share the rows.
    """
    refitted = refit(weight, hessian, cross)
    scale = best_weight_scale(refitted, hessian.diagonal(), bits)
    return QuantizedGroup(quantizer, weight, _codes(refitted, scale, hessian, bits, devices), scale, bits)


def is_calibrated(kind: TypeSpec) -> bool:
    """Whether layers of a type are calibrated: 8-bit layers without a transform are rounded to nearest."""
    return kind.weight_bits < 8 or kind.has_transform


def _transform(block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan) -> InputTransform:
    """The closed-form transform of a group's input, its diagonal folded into the norm before it.

    The factor over the head dimension of o is the identity here: if there is one, it is folded into v.
    """
    weight = block.weight(group)
    sizes = group_factor_sizes(block, group)
    folded = has_folded_factor(group)
    found = closed_form(
        inputs.moment(),
        weight_moment(weight),
        sizes,
        plan.generator(group, block.index),
        fit_diagonal=group.norm is not None,
        fit_right=not folded,
    )
    diagonal = torch.ones(weight.shape[1], device=block.device)
    if group.norm:
        diagonal = fold_into_norm(block, group, found.diagonal)
    right = None if folded else found.right.float().to(block.device)
    return InputTransform(diagonal, found.left.float().to(block.device), right)


def identity_transform(block: LoadedBlock, group: Group) -> InputTransform:
    """Identity matrices for the factors that the group's layers store."""
    sizes = group_factor_sizes(block, group)
    left, right = (torch.eye(size, device=block.device) for size in (sizes.left, sizes.right))
    return InputTransform(None, left, None if has_folded_factor(group) else right)


def group_factor_sizes(block: LoadedBlock, group: Group) -> FactorSizes:
    """Sizes of the two factors of a group's transform, one of which may be folded away."""
    input_size = block.linear(group.linears[0]).in_features
    if has_folded_factor(group):
        assert group.source
        return FactorSizes(input_size // group.source.head_dim, group.source.head_dim)
    return factor_sizes(input_size)


def has_folded_factor(group: Group) -> bool:
    """Whether layers of the group store no right factor, because its place is in v."""
    return group.source is not None and group.source.mixes


def activation_clip(transform: InputTransform, moment: Tensor, inputs: GroupInput, bits: int) -> float:
    """The best clip ratio on a sample of the tokens, as float32 stores it; `moment` is that of the weight's rows."""
    some = slice(None, None, max(1, len(inputs) // CLIP_TOKENS))
    sample = transform(inputs.x[some].to(moment.device))
    clip = best_activation_clip(sample, moment, inputs.token_weights[some], bits)
    return torch.tensor(clip, dtype=torch.float32).item()


def quantized_moments(quantizer: InputQuantizer, inputs: GroupInput) -> tuple[Tensor, Tensor]:
    """Second moments Xq' Xq and Xq' X of the quantized input Xq, X being the exact one, per token."""

    def factors(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        exact = quantizer.transform.to(x.device)(x)
        rounded = quantize_tokens(exact, quantizer.clip, quantizer.bits)
        return rounded * (inputs.token_weights[part].to(x) / len(inputs))[:, None], rounded, exact

    hessian, cross = inputs.products(factors)
    return hessian, cross


def _codes(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int, devices: DevicePool) -> Tensor:
    """GPTQ followed by coordinate descent, with rows divided among the devices."""

    def round_rows(rows: tuple[Tensor, Tensor], position: int) -> Tensor:
        w, s, h = (t.to(devices.devices[position]) for t in (*rows, hessian))
        return coordinate_descent(gptq(w, s, h, bits), w, s, h, bits)

    shares = zip(weight.chunk(len(devices)), scale.chunk(len(devices)), strict=True)
    return torch.cat([codes.to(weight) for codes in devices.map(round_rows, shares)])
