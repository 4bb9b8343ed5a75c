# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a decoder block share an input, found by running the block instead of a table of names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .structure import Group, Role
from .unsupported import SUPPORTED, what_differs

Run = Callable[[], object]


def trace(block: nn.Module, run: Run, name: str) -> dict[Role, Group]:
    """Find the groups of a block.

    Args:
        block: with weights.
        run: runs the block on some tokens.
        name: of the block, for messages.

    Raises:
        CalibrationError: the block is not attention (q, k, v, o) followed by a gated MLP (gate, up, down) with
            scaling norms before both.
    """
    inputs, outputs = _record(block, run)
    by_input: list[tuple[Tensor, list[str]]] = []
    for linear, value in inputs:
        for known, members in by_input:
            if known is value:
                members.append(linear)
                break
        else:
            by_input.append((value, [linear]))
    sizes = [len(members) for _, members in by_input]
    listing = "; ".join(", ".join(members) for _, members in by_input) or "none"
    if sizes != [3, 1, 2, 1]:
        difference = what_differs([members for _, members in by_input])
        raise CalibrationError(
            f"{name}: {difference}expected q, k, v with one input, then o, then "
            f"gate and up with one input, then down; found linear layers {listing}. {SUPPORTED}"
        )
    covered = {linear for linear, _ in inputs}
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim > 1 and parameter_name.rpartition(".")[0] not in covered:
            raise CalibrationError(
                f"{name}: matrix {parameter_name} {list(parameter.shape)} belongs to none of the layers q, k, v, o, "
                f"gate, up, down. {SUPPORTED}"
            )
    groups: dict[Role, Group] = {}
    for role, (value, members) in zip(Role, by_input, strict=True):
        norm = next((n for n, out in outputs if out is value), None)
        if role in (Role.QKV, Role.GATE_UP):
            problem = _no_norm(block, run) if norm is None else _unusable_norm(block.get_submodule(norm), value)
            if problem:
                raise CalibrationError(
                    f"{name}: the input of {', '.join(members)} must be the output of a norm that multiplies by its "
                    f"weight (RMSNorm), into which a part of the transform is folded; but {problem}. {SUPPORTED}"
                )
            groups[role] = Group(role, tuple(members), norm)
        else:
            before = groups[Role.QKV if role is Role.O else Role.GATE_UP].linears
            groups[role] = Group(role, tuple(members), None, _linear_source(block, run, members[0], value, before))
    return groups


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer `name` of a block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _record(block: nn.Module, run: Run) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Inputs of the linear layers, and outputs of the modules whose weight is a vector, in order of execution."""
    inputs: list[tuple[str, Tensor]] = []
    outputs: list[tuple[str, Tensor]] = []
    hooks = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: inputs.append((n, args[0]))))
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: outputs.append((n, out))))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, outputs


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


def _no_norm(block: nn.Module, run: Run) -> str:
    """Why an input is no output of a norm with a weight."""
    producers: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: producers.append(type(module).__name__))
        for module in block.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is None
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return f"{producers[0]} has no weight" if producers else "no norm is there"


def _unusable_norm(norm: nn.Module, output: Tensor) -> str:
    """Why a diagonal cannot be folded into a norm with output [..., n]; empty if it can."""
    if getattr(norm, "bias", None) is not None:
        return f"{type(norm).__name__} has a bias"
    return "" if _scales(norm, output) else f"{type(norm).__name__} multiplies by something else, such as 1 + weight"


def _scales(norm: nn.Module, output: Tensor) -> bool:
    """Whether doubling the norm's weight doubles its output (Gemma's 1 + weight does not)."""
    assert isinstance(norm.weight, Tensor)
    sample = torch.randn(4, output.shape[-1], generator=torch.Generator().manual_seed(0)).to(output)
    with torch.no_grad():
        before = norm(sample)
        norm.weight.mul_(2)
        after = norm(sample)
        norm.weight.div_(2)
    return torch.allclose(after, 2 * before, rtol=1e-4, atol=1e-6)


def _linear_source(block: nn.Module, run: Run, target: str, value: Tensor, candidates: tuple[str, ...]) -> str | None:
    for candidate in candidates:
        with _doubled(block.get_submodule(candidate)):
            inputs, _ = _record(block, run)
        changed = next(v for n, v in inputs if n == target)
        if torch.allclose(changed, 2 * value, rtol=1e-3, atol=1e-5 * value.abs().max().item()):
            return candidate
    return None


@contextmanager
def _doubled(module: nn.Module) -> Iterator[None]:
    """Inside, the module's output is twice what it was."""
    hook = module.register_forward_hook(lambda _, args, out: out * 2)
    try:
        yield
    finally:
        hook.remove()
