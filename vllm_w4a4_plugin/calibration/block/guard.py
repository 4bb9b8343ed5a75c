# SPDX-License-Identifier: Apache-2.0
"""Quantization of a group with a way back: what is worse than rounding to nearest on held-out tokens is undone."""

from dataclasses import dataclass

from torch import Tensor

from ..model.block import LoadedBlock
from ..model.structure import Group
from .group import identity_transform, is_calibrated, quantize_group
from .moments import GroupInput
from .nearest import IDENTITY, is_larger, layer_errors, nearest
from .plan import BlockPlan
from .quantized import QuantizedGroup

ROUNDED = "rounded to nearest"


@dataclass(frozen=True)
class GroupErrors:
    """Relative errors of a group's layers.

    Attributes:
        plain: of each layer, rounded to nearest without a transform.
        found: of each layer, as quantized.
        fallback: `ROUNDED` if calibration was undone.
    """

    plain: list[float]
    found: list[float]
    fallback: str = ""


def guarded_group(
    block: LoadedBlock, group: Group, inputs: GroupInput, sample: Tensor, plan: BlockPlan, held_out: bool
) -> tuple[QuantizedGroup, GroupErrors]:
    """A group, calibrated, or rounded to nearest if that is better for its layers on average.

    Layers of a group share their transform and their activations' codes, so they fall back together.

    Args:
        block: to which the group belongs; a diagonal is folded into its norm.
        group: to quantize.
        inputs: for statistics; without tokens if the plan is plain.
        sample: inputs [tokens, input_size] on which errors are measured, on the block's device.
        plan: of the block.
        held_out: whether the sample is no part of `inputs`, so that it can judge.
    """
    kind, weight, sizes = plan.types[group.key].spec, block.weight(group), block.output_sizes(group)
    exact = sample @ weight.t()
    identity = identity_transform(block, group) if kind.has_transform else IDENTITY
    plain = nearest(weight, kind, identity)
    plain_errors = layer_errors(plain, sample, exact, sizes)
    if plan.plain:
        return plain, GroupErrors(plain_errors, plain_errors, ROUNDED if is_calibrated(kind) else "")
    norm = block.module.get_submodule(group.norm).weight if group.norm else None
    assert norm is None or isinstance(norm, Tensor)
    stored_norm = None if norm is None else norm.clone()
    calibrated = quantize_group(block, group, inputs, plan)
    errors = layer_errors(calibrated, sample, exact, sizes)
    if held_out and is_larger(sum(errors), sum(plain_errors)):
        if norm is not None and stored_norm is not None:
            norm.copy_(stored_norm)  # the diagonal was folded there
        return plain, GroupErrors(plain_errors, plain_errors, ROUNDED)
    return calibrated, GroupErrors(plain_errors, errors)
