# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a decoder block share an input, found by running the block instead of a table of names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .structure import Group, Role

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
        raise CalibrationError(
            f"{name}: expected q, k, v with one input, then o, then gate and up with one input, then down; found "
            f"linear layers {listing}. Only dense models of the Llama, Qwen2, Qwen3 and Mistral families can be "
            "quantized (no mixture of experts, no fused q/k/v, no MLP without gate)."
        )
    covered = {linear for linear, _ in inputs}
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim > 1 and parameter_name.rpartition(".")[0] not in covered:
            raise CalibrationError(
                f"{name}: matrix {parameter_name} {list(parameter.shape)} belongs to none of the layers q, k, v, o, "
                "gate, up, down; this kind of block cannot be quantized."
            )
    groups: dict[Role, Group] = {}
    for role, (value, members) in zip(Role, by_input, strict=True):
        norm = next((n for n, out in outputs if out is value), None)
        if role in (Role.QKV, Role.GATE_UP):
            if norm is None or not _scales(block.get_submodule(norm), value):
                raise CalibrationError(
                    f"{name}: the input of {', '.join(members)} must be the output of a norm that multiplies by its "
                    "weight (RMSNorm); the transform's diagonal is folded there."
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


def _scales(norm: nn.Module, output: Tensor) -> bool:
    """Whether doubling the norm's weight doubles its output (Gemma's 1 + weight does not)."""
    if getattr(norm, "bias", None) is not None:
        return False
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
