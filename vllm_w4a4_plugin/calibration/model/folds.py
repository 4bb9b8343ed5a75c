# SPDX-License-Identifier: Apache-2.0
"""Into which weights before a group of linear layers a part of its transform can be folded.

Every answer is found by running the block: factors are put where the fold would put them, their inverse at the group's
input, and the block's output must stay the same. What else reads a norm, or lies between v and o, need not be known.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .hooks import hooked
from .structure import Group, Role, Source

Run = Callable[[], object]
Change = Callable[[Tensor], Tensor]

NO_NORM = "no diagonal: the input is not the output of a norm"
SHARED_NORM = "no diagonal: the norm before it feeds other layers, too"
NO_SOURCE = "no diagonal: the input is not linear in the output of a layer before it"


@dataclass(frozen=True)
class Width:
    """Of the attention: channels of a head, and of all heads of v."""

    head_dim: int
    values: int


def norm_fold(block: nn.Module, run: Run, group: Group, norm: str | None, value: Tensor) -> Group:
    """The group with the norm that takes its diagonal, or with a note that says why there is none.

    Args:
        block: to which the group belongs.
        run: runs it on some tokens.
        group: without a norm.
        norm: whose output is the group's input, None if there is none.
        value: the group's input.
    """
    if norm is None:
        return replace(group, note=NO_NORM)
    offset = _weight_offset(block.get_submodule(norm), value)
    if offset is None:
        kind = type(block.get_submodule(norm)).__name__
        return replace(group, note=f"no diagonal: {kind} is not a product with its weight")
    factors = _factors(value.shape[-1], value)
    if not _cancels(block, run, group, norm, lambda x: x * factors, lambda x: x / factors):
        return replace(group, note=SHARED_NORM)
    return replace(group, norm=norm, norm_offset=offset)


def source_fold(
    block: nn.Module, run: Run, group: Group, value: Tensor, candidates: Sequence[str], width: Width
) -> Group:
    """The group with its source, or with a note that says that there is none.

    Args:
        block, run, group, value: as for `norm_fold`.
        candidates: linear layers in whose output the input may be linear.
        width: of the attention.
    """
    for name in candidates:
        for source in _possible_sources(block.get_submodule(name), name, group, value.shape[-1], width):
            index = torch.tensor(source.of_input(value.shape[-1]), device=value.device)
            factors = _factors(source.channels, value)
            inverse = 1 / factors[index]
            if not _cancels(block, run, group, name, _within(source, factors), lambda x, i=inverse: x * i):  # type: ignore[misc]
                continue
            mixes = group.role is Role.O and _mixes(block, run, group, source)
            return replace(group, source=replace(source, mixes=mixes))
    return replace(group, note=NO_SOURCE)


def _possible_sources(module: nn.Module, name: str, group: Group, input_size: int, width: Width) -> Iterator[Source]:
    """v or up as layers of their own, and as the last or first channels of a layer that holds them."""
    assert isinstance(module, nn.Linear)
    channels = width.values if group.role is Role.O else input_size
    head_dim = width.head_dim if group.role is Role.O else input_size
    if input_size % channels or channels % head_dim or channels > module.out_features:
        return
    for start in dict.fromkeys((module.out_features - channels, 0)):
        yield Source(name, start, channels, head_dim)


def _mixes(block: nn.Module, run: Run, group: Group, source: Source) -> bool:
    """Whether a rotation of each head of the source reaches the group's input as the same rotation."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(source.head_dim, source.head_dim, generator=generator))

    def rotate(x: Tensor, matrix: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, source.head_dim)) @ matrix.to(x)).flatten(-2)

    def forward(x: Tensor) -> Tensor:
        stop = source.start + source.channels
        rotated = rotate(x[..., source.start : stop], rotation)
        return torch.cat([x[..., : source.start], rotated, x[..., stop:]], -1)

    return _cancels(block, run, group, source.linear, forward, lambda x: rotate(x, rotation.t()))


def _within(source: Source, factors: Tensor) -> Change:
    """Multiplies the source's channels by factors."""

    def change(x: Tensor) -> Tensor:
        every = torch.ones(x.shape[-1]).to(x)
        every[source.start : source.start + source.channels] = factors
        return x * every

    return change


def _factors(size: int, like: Tensor) -> Tensor:
    """[size] numbers between 0.5 and 2, all different."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).mul_(1.5).add_(0.5).to(like)


def _cancels(block: nn.Module, run: Run, group: Group, producer: str, change: Change, undo: Change) -> bool:
    """Whether the block computes the same if an output is changed and the change is undone at the group's input."""
    with torch.no_grad():
        expected = _tensor(run())
        with ExitStack() as stack:
            stack.enter_context(_changed_output(block.get_submodule(producer), change))
            for name in group.linears:
                stack.enter_context(_changed_input(block.get_submodule(name), undo))
            found = _tensor(run())
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def _tensor(output: object) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    assert isinstance(output, Tensor)
    return output


def _changed_output(module: nn.Module, change: Change) -> AbstractContextManager[None]:
    return hooked(module.register_forward_hook(lambda _, args, out: change(out)))


def _changed_input(module: nn.Module, change: Change) -> AbstractContextManager[None]:
    return hooked(module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:])))


def _weight_offset(norm: nn.Module, output: Tensor) -> float | None:
    """The number which the norm adds to its weight before it multiplies by it; None if it does something else."""
    if getattr(norm, "bias", None) is not None:
        return None
    assert isinstance(norm.weight, Tensor)
    sample = torch.randn(4, output.shape[-1], generator=torch.Generator().manual_seed(0)).to(output)
    stored = norm.weight.clone()
    with torch.no_grad():
        before = norm(sample)
        for offset in (0.0, 1.0):
            norm.weight.copy_(2 * (stored + offset) - offset)
            doubled = norm(sample)
            norm.weight.copy_(stored)
            if torch.allclose(doubled, 2 * before, rtol=1e-4, atol=1e-6):
                return offset
    return None
