# SPDX-License-Identifier: Apache-2.0
"""Parts of a transform that cost nothing at run time, because they are folded into the weights before the layer.

The diagonal of q, k, v and of gate, up goes into the norm before them; that of down into up, which is multiplied with
the gate; that of o, with the factor over each head, into v.
"""

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.block import LoadedBlock
from ..model.structure import Group, Role, head_dim
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
    if group.role is Role.DOWN:
        transform = _channel_transform(block, group, inputs, plan)
        if _helps(block, group, transform, plan, held_out):
            _fold_channels(block, group, transform.diagonal)
            return True
        return False
    head = head_dim(block.model.config.get_text_config())
    assert group.source
    input_size, kv_size = block.linear(group.linears[0]).in_features, block.linear(group.source).out_features
    heads, kv_heads = input_size // head, kv_size // head
    column = torch.arange(input_size)
    shared = column // head // (heads // kv_heads) * head + column % head  # which channel of v a column of o reads
    transform = closed_form(
        inputs.moment(),
        weight_moment(block.weight(group)),
        FactorSizes(heads, head),
        plan.generator(group.role, block.index),
        tied=shared,
    )
    if not _helps(block, group, transform, plan, held_out):
        return False
    _fold_heads(block.linear(group.source), block.linear(group.linears[0]), transform, shared, head)
    return True


def fold_into_norm(block: LoadedBlock, norm_name: str, diagonal: Tensor) -> Tensor:
    """Multiply a norm's weight by a diagonal.

    Returns:
        [n]: the diagonal that was actually folded, since the norm's stored dtype rounds it.
    """
    norm = block.module.get_submodule(norm_name)
    assert isinstance(norm.weight, Tensor)
    dtype = block.stored_dtype(f"{norm_name}.weight")
    new = (norm.weight * diagonal.to(norm.weight)).to(dtype).to(norm.weight.dtype)
    effective = torch.where(norm.weight == 0, torch.ones_like(new), new / norm.weight)
    effective = torch.where(effective == 0, torch.ones_like(new), effective)
    norm.weight.copy_(torch.where(norm.weight == 0, norm.weight, norm.weight * effective))
    return effective


def _helps(block: LoadedBlock, group: Group, transform: Transform, plan: BlockPlan, held_out: Tensor | None) -> bool:
    """Whether rounding to nearest is no worse with a transform of the group's input than without.

    For most tokens, or for those with the largest outputs: a fold is meant for huge values, which few tokens have.
    """
    if held_out is None:
        return True
    weight, kind = block.weight(group), plan.types[group.role].spec
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


def _channel_transform(block: LoadedBlock, group: Group, inputs: GroupInput, plan: BlockPlan) -> Transform:
    """The transform of down's input; for a type without one, the diagonal that balances x and W per channel."""
    weight = block.weight(group)
    sizes = factor_sizes(weight.shape[1])
    if plan.types[group.role].spec.has_transform:
        return closed_form(inputs.moment(), weight_moment(weight), sizes, plan.generator(group.role, block.index))
    ratio = weight.square().sum(0) / inputs.energy().clamp_min(1e-12)
    scale = ratio.pow(0.25).clamp_min(1e-6).double().cpu()
    identities = (torch.eye(size, dtype=torch.float64) for size in (sizes.left, sizes.right))
    return Transform(scale / scale.log().mean().exp(), *identities)


def _fold_channels(block: LoadedBlock, group: Group, diagonal: Tensor) -> None:
    """up' = up * d per output channel, down' = down / d per input channel."""
    assert group.source
    source, target = block.linear(group.source), block.linear(group.linears[0])
    scale = diagonal.to(source.weight)
    source.weight.mul_(scale[:, None])
    if source.bias is not None:
        source.bias.mul_(scale)
    target.weight.div_(scale)


def _fold_heads(source: nn.Linear, target: nn.Linear, transform: Transform, shared: Tensor, head: int) -> None:
    """v' = (v * d) R per head, and the inverse in o.

    Args:
        source: v. target: o.
        transform: of o's input; d is equal where `shared` is.
        shared: [n] for each column of o, the channel of v.
        head: size of a head.
    """
    device, kv_size = source.weight.device, source.out_features
    d = torch.empty(kv_size, dtype=torch.float64)
    d[shared] = transform.diagonal
    right = transform.right.to(device)
    blocks = (source.weight.double() * d.to(device)[:, None]).reshape(kv_size // head, head, -1)
    source.weight.copy_(torch.matmul(right.t(), blocks).reshape(source.weight.shape))
    if source.bias is not None:
        source.bias.copy_(((source.bias.double() * d.to(device)).reshape(kv_size // head, head) @ right).flatten())
    weight = target.weight.double() / transform.diagonal.to(device)
    inverse = torch.linalg.inv(right).t().contiguous()
    target.weight.copy_(apply_kronecker(weight, None, inverse))
