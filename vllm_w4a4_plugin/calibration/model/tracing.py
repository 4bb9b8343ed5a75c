# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a decoder block share an input, found by running the block instead of a table of families."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of

from .folds import Run, Width, norm_fold, source_fold
from .hooks import hooked
from .structure import Group, Role

ROLES: dict[tuple[str, ...], Role] = {
    ("q_proj", "k_proj", "v_proj"): Role.QKV,
    ("qkv_proj",): Role.QKV,
    ("o_proj",): Role.O,
    ("gate_proj", "up_proj"): Role.GATE_UP,
    ("gate_up_proj",): Role.GATE_UP,
    ("down_proj",): Role.DOWN,
}
"""Last parts of the names of layers that vLLM computes as one -> what they are for."""
LAYERS_OF_ROLES = (3, 1, 2, 1)

Inputs = list[tuple[Tensor, list[str]]]


def trace(block: nn.Module, run: Run, width: Width) -> dict[str, Group]:
    """Find the groups of a block by their keys, in order of execution.

    Linear layers whose role is not known, and experts, belong to no group.

    Args:
        block: with weights.
        run: runs the block on some tokens.
        width: of the attention.
    """
    inputs, norms = _record(block, run)
    groups: dict[str, Group] = {}
    is_positional = tuple(len(members) for _, members in inputs) == LAYERS_OF_ROLES
    for position, (value, members) in enumerate(inputs):
        known = list(_known(members))
        if is_positional and not known:  # a model with names of its own
            known = [(list(Role)[position], tuple(members))]
        for role, linears in known:
            before = [name for _, earlier in reversed(inputs[:position]) for name in earlier]
            number = 1 + sum(group.role is role for group in groups.values())
            group = _group(block, run, Group(role, linears, number=number), value, norms, before, width)
            groups[group.key] = group
    return groups


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer `name` of a block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def randomize(block: nn.Module, hidden: Tensor) -> Tensor:
    """Give a block random weights; returns a random input like `hidden`.

    The structure does not depend on weights, but zeros among them would hide which output depends on which.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for parameter in block.parameters():
        if parameter.ndim > 1:
            parameter.data = normal(parameter) / parameter.shape[-1] ** 0.5
        else:
            parameter.data = normal(parameter).abs() + 0.5
    return normal(hidden)


def _known(members: Sequence[str]) -> Iterator[tuple[Role, tuple[str, ...]]]:
    """Complete sets of layers with a known role among layers with one input, in order of execution."""
    by_parent: dict[str, list[str]] = {}
    for name in members:
        if kind_of(name) is Kind.LINEAR:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_parent.values():
        leaves = [name.rpartition(".")[2] for name in names]
        for wanted, role in ROLES.items():
            if set(wanted) <= set(leaves):
                yield role, tuple(name for name, leaf in zip(names, leaves, strict=True) if leaf in wanted)


def _group(
    block: nn.Module,
    run: Run,
    group: Group,
    value: Tensor,
    norms: Sequence[tuple[str, Tensor]],
    before: Sequence[str],
    width: Width,
) -> Group:
    """The group with that into which its diagonal can be folded.

    Args:
        block, run, width: as for `trace`.
        group: without it.
        value: its input.
        norms: names and outputs of norms.
        before: linear layers that ran before, those with the latest input first.
    """
    norm = next((name for name, output in norms if output.data_ptr() == value.data_ptr()), None)  # or a view of it
    if norm is not None or group.role in (Role.QKV, Role.GATE_UP):
        return norm_fold(block, run, group, norm, value)
    return source_fold(block, run, group, value, before, width)


def _record(block: nn.Module, run: Run) -> tuple[Inputs, list[tuple[str, Tensor]]]:
    """Linear layers by input, and outputs of the modules whose weight is a vector, in order of execution."""
    by_input: Inputs = []
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str, value: Tensor) -> None:
        for known, members in by_input:
            if known is value:
                members.append(name)
                return
        by_input.append((value, [name]))

    hooks = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: keep(n, args[0])))
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: outputs.append((n, out))))
    with hooked(*hooks), torch.no_grad():
        run()
    return by_input, outputs
