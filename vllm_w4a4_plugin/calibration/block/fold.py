# SPDX-License-Identifier: Apache-2.0
"""Parts of a transform that cost nothing at run time, because they are folded into the weights before the layer.

The diagonal of q, k, v and of gate, up goes into the norm before them; that of down into up, which is multiplied with
the gate; that of o, with the factor over each head, into v.
"""

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.block import LoadedBlock
from ..model.structure import Group, Role, Source
from ..transforms.closed_form import Transform, closed_form
from ..transforms.kronecker import apply_kronecker
from ..transforms.sizes import FactorSizes, factor_sizes
from .moments import GroupInput, weight_moment
from .nearest import is_larger, nearest, relative_error
from .plan import BlockPlan
from .quantized import InputTransform, inversely_transformed


def has_foldable_source(group: Group, kind: QuantType) -> bool:
    """Whether a part of the group's transform is folded into another linear layer."""
    if group.source is None or not kind.spec.is_quantized:
        return False
    return group.role is Role.DOWN or kind.spec.has_transform


def fold_into_source(
    block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan, held_out: Tensor | None = None
) -> bool:
    """Fold the part of the transform of o or down that is not computed online into v or up, if that helps.

    Args:
        block: changed in place.
        group: o or down, for which `has_foldable_source` is true.
        inputs: of the group.
        plan: of the block.
        held_out: further inputs [tokens, input_size] on which plain rounding must be better with the transform than
            without; None folds in any case.

    Returns:
        Whether it was folded.
    """
    source = group.source
    assert source
    input_size = block.linear(group.linears[0]).in_features
    channels = torch.tensor(source.of_input(input_size))
    if source.mixes:
        transform = closed_form(
            inputs.moment(),
            weight_moment(block.weight(group)),
            FactorSizes(input_size // source.head_dim, source.head_dim),
            plan.generator(group, block.index),
            tied=channels,
        )
    else:
        transform = _channel_transform(block, group, inputs, plan, channels)
    if not _helps(block, group, transform, plan, held_out):
        return False
    if source.mixes:
        _fold_heads(block, group, transform, channels)
    else:
        _fold_channels(block, group, transform.diagonal, channels)
    return True


def fold_into_norm(block: LoadedBlock, group: Group, diagonal: Tensor) -> Tensor:
    """Multiply the factors of the norm before a group, weight + norm_offset, by a diagonal.

    Returns:
        [n]: the diagonal that was actually folded, since the norm's stored dtype rounds its weight.
    """
    norm = block.module.get_submodule(group.norm or "")
    assert isinstance(norm.weight, Tensor)
    dtype = block.stored_dtype(f"{group.norm}.weight")
    offset, factors = group.norm_offset, norm.weight + group.norm_offset
    new = (factors * diagonal.to(factors) - offset).to(dtype).to(factors.dtype) + offset
    effective = torch.where(factors == 0, torch.ones_like(new), new / factors)
    effective = torch.where(effective == 0, torch.ones_like(new), effective)
    norm.weight.copy_(torch.where(factors == 0, norm.weight, factors * effective - offset))
    return effective


def _helps(block: LoadedBlock, group: Group, transform: Transform, plan: BlockPlan, held_out: Tensor | None) -> bool:
    """Whether rounding to nearest is no worse with a transform of the group's input than without.

    For most tokens, or for those with the largest outputs: a fold is meant for huge values, which few tokens have.
    """
    if held_out is None:
        return True
    weight, kind = block.weight(group), plan.types[group.key].spec
    x = held_out.to(weight.device)
    exact = x @ weight.t()
    factors = (transform.diagonal, transform.left, transform.right)
    online = InputTransform(*(factor.float().to(weight.device) for factor in factors))
    plain, transformed = nearest(weight, kind), nearest(inversely_transformed(weight, online), kind, online)
    rounded, found = plain.output(x), transformed.output(x)
    return not (
        is_larger(relative_error(found, exact), relative_error(rounded, exact))
        and is_larger((found - exact).norm().item(), (rounded - exact).norm().item())
    )


def _channel_transform(
    block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan, channels: Tensor
) -> Transform:
    """The transform of a group's input; for a type without one, the diagonal that balances x and W per channel.

    Args:
        block, group, inputs, plan: as for `fold_into_source`.
        channels: [input_size] for each input channel, that of the source; entries of the diagonal are equal where these
            are.
    """
    weight = block.weight(group)
    sizes = factor_sizes(weight.shape[1])
    if plan.types[group.key].spec.has_transform:
        tied = channels if group.source and group.source.channels < len(channels) else None
        moments = inputs.moment(), weight_moment(weight)
        return closed_form(*moments, sizes, plan.generator(group, block.index), tied=tied)
    ratio = weight.square().sum(0) / inputs.energy().clamp_min(1e-12)
    scale = ratio.pow(0.25).clamp_min(1e-6).double().cpu()
    identities = (torch.eye(size, dtype=torch.float64) for size in (sizes.left, sizes.right))
    return Transform(scale / scale.log().mean().exp(), *identities)


def _fold_channels(block: LoadedBlock, group: Group, diagonal: Tensor, channels: Tensor) -> None:
    """source' = source * d per output channel, target' = target / d per input channel."""
    assert group.source
    weight, bias = _source_rows(block, group.source)
    target = block.linear(group.linears[0])
    scale = _of_source(group.source, diagonal, channels).to(weight)
    weight.mul_(scale[:, None])
    if bias is not None:
        bias.mul_(scale)
    target.weight.div_(diagonal.to(weight))


def _fold_heads(block: LoadedBlock, group: Group, transform: Transform, channels: Tensor) -> None:
    """v' = (v * d) R per head, and the inverse in o.

    Args:
        block: changed in place.
        group: o.
        transform: of o's input; d is equal where `channels` is.
        channels: [n] for each column of o, the channel of v.
    """
    assert group.source
    weight, bias = _source_rows(block, group.source)
    target, head = block.linear(group.linears[0]), group.source.head_dim
    d = _of_source(group.source, transform.diagonal, channels).to(weight.device)
    right = transform.right.to(weight.device)
    blocks = (weight.double() * d[:, None]).reshape(len(d) // head, head, -1)
    weight.copy_(torch.matmul(right.t(), blocks).reshape(weight.shape))
    if bias is not None:
        bias.copy_(((bias.double() * d).reshape(len(d) // head, head) @ right).flatten())
    columns = target.weight.double() / transform.diagonal.to(weight.device)
    inverse = torch.linalg.inv(right).t().contiguous()
    target.weight.copy_(apply_kronecker(columns, None, inverse))


def _source_rows(block: LoadedBlock, source: Source) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the source's channels, as views."""
    layer, rows = block.linear(source.linear), slice(source.start, source.start + source.channels)
    return layer.weight[rows], None if layer.bias is None else layer.bias[rows]


def _of_source(source: Source, values: Tensor, channels: Tensor) -> Tensor:
    """[channels of the source]: values [input_size] of its channels, which are equal where `channels` is."""
    result = torch.empty(source.channels, dtype=values.dtype)
    result[channels] = values.cpu()
    return result
