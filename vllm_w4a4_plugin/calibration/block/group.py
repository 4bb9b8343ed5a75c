# SPDX-License-Identifier: Apache-2.0
"""Quantization of one group of linear layers: transform, activation clip, refitted weights, codes and scales."""

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint.types import TypeSpec

from ..devices import DevicePool
from ..model.block import LoadedBlock
from ..model.structure import Group, Role, head_dim
from ..transforms.closed_form import closed_form
from ..transforms.kronecker import apply_kronecker, kronecker_inverse
from ..transforms.sizes import FactorSizes, factor_sizes
from .fold import fold_into_norm
from .moments import GroupInput, weight_moment
from .plan import BlockPlan
from .quantized import InputQuantizer, InputTransform, QuantizedGroup
from .rounding import (
    absmax_scale,
    best_activation_clip,
    best_weight_scale,
    coordinate_descent,
    gptq,
    quantize_tokens,
    refit,
    round_to_nearest,
)

ROWS_IN_FLOAT64 = 2048
CLIP_TOKENS = 2048


def quantize_group(block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan) -> QuantizedGroup:
    """Codes and scales of a group's weights, and the quantizer of its input.

    Args:
        block: to which the group belongs; a diagonal is folded into its norm.
        group: to quantize.
        inputs: what it receives now, with the layers before it quantized.
        plan: of the block.
    """
    weight, kind = block.weight(group), plan.types[group.role].spec
    if kind.weight_bits >= 8 and not kind.has_transform:
        return _to_nearest(weight, kind)
    transform, clip = InputTransform(), 1.0
    if kind.has_transform:
        transform = _transform(block, group, inputs, plan)
        weight = _inversely_transformed(weight, transform)
        clip = _activation_clip(transform, weight, inputs, kind.activation_bits)
    quantizer = InputQuantizer(kind.activation_bits, transform, clip)
    refitted, hessian = _refitted(weight, quantizer, inputs)
    scale = best_weight_scale(refitted, hessian.diagonal(), kind.weight_bits)
    codes = _codes(refitted, scale, hessian, kind.weight_bits, inputs.devices)
    return QuantizedGroup(quantizer, weight, codes, scale, kind.weight_bits)


def _to_nearest(weight: Tensor, kind: TypeSpec) -> QuantizedGroup:
    """Rounded to nearest: at 8 bits its error is far below everything else's."""
    scale = absmax_scale(weight, kind.weight_bits)
    codes = round_to_nearest(weight, scale, kind.weight_bits)
    return QuantizedGroup(InputQuantizer(kind.activation_bits), weight, codes, scale, kind.weight_bits)


def _transform(block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan) -> InputTransform:
    """The closed-form transform of a group's input, its diagonal folded into the norm before it.

    The factor over the head dimension of o is folded into v already and the identity here.
    """
    weight = block.weight(group)
    folded = group.role is Role.O and group.source is not None
    sizes = factor_sizes(weight.shape[1])
    if folded:
        head = head_dim(block.model.config.get_text_config())
        sizes = FactorSizes(weight.shape[1] // head, head)
    found = closed_form(
        inputs.moment(),
        weight_moment(weight),
        sizes,
        plan.generator(group.role, block.index),
        fit_diagonal=group.norm is not None,
        fit_right=not folded,
    )
    diagonal = torch.ones(weight.shape[1], device=block.device)
    if group.norm:
        diagonal = fold_into_norm(block, group.norm, found.diagonal)
    right = None if folded else found.right.float().to(block.device)
    return InputTransform(diagonal, found.left.float().to(block.device), right)


def _inversely_transformed(weight: Tensor, transform: InputTransform) -> Tensor:
    """Weights whose product with the transformed input is that of `weight` with the input."""
    inverse = kronecker_inverse(transform.left, transform.right)
    # In float64, a part at a time: float32 would lose as many digits as the factors' condition number has.
    parts = [
        apply_kronecker((rows / transform.diagonal).double(), *inverse).float()
        for rows in weight.split(ROWS_IN_FLOAT64)
    ]
    return torch.cat(parts)


def _activation_clip(transform: InputTransform, weight: Tensor, inputs: GroupInput, bits: int) -> float:
    """The best clip ratio on a sample of the tokens, as float32 stores it."""
    some = slice(None, None, max(1, len(inputs) // CLIP_TOKENS))
    sample = transform(inputs.x[some].to(weight.device))
    clip = best_activation_clip(sample, weight_moment(weight), inputs.token_weights[some], bits)
    return torch.tensor(clip, dtype=torch.float32).item()


def _refitted(weight: Tensor, quantizer: InputQuantizer, inputs: GroupInput) -> tuple[Tensor, Tensor]:
    """Weights refitted to the quantized input Xq, and its second moment Xq' Xq, the Hessian of the rounding error."""

    def factors(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        exact = quantizer.transform.to(x.device)(x)
        rounded = quantize_tokens(exact, quantizer.clip, quantizer.bits)
        return rounded * (inputs.token_weights[part].to(x) / len(inputs))[:, None], rounded, exact

    hessian, cross = inputs.products(factors)
    return refit(weight, hessian, cross), hessian


def _codes(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int, devices: DevicePool) -> Tensor:
    """GPTQ followed by coordinate descent, with rows divided among the devices."""

    def round_rows(rows: tuple[Tensor, Tensor], position: int) -> Tensor:
        w, s, h = (t.to(devices.devices[position]) for t in (*rows, hessian))
        return coordinate_descent(gptq(w, s, h, bits), w, s, h, bits)

    shares = zip(weight.chunk(len(devices)), scale.chunk(len(devices)), strict=True)
    return torch.cat([codes.to(weight) for codes in devices.map(round_rows, shares)])
