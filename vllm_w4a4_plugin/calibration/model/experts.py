# SPDX-License-Identifier: Apache-2.0
"""Weights that transformers keeps under another name, or in another form, than the files: experts and routers.

transformers computes the experts of a layer from two tensors, `experts.gate_up_proj` [experts, 2 * intermediate,
hidden] and `experts.down_proj` [experts, hidden, intermediate]. The files have each expert's matrices by themselves,
and so has what is quantized: a `SeparateExperts` takes the place of transformers' module.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from .folds import Run
from .hooks import hooked
from .structure import EXPERT_LEAVES, Experts
from .weights import FloatWeights

_PROJECTIONS: Mapping[str, Sequence[Sequence[str]]] = {
    # of transformers -> those of an expert in the files of Qwen and others, and in Mixtral's
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_MODULES = ("mlp", "block_sparse_moe")
"""What transformers calls the module of experts and router, and what Mixtral's files call it."""
_LEAVES = dict(zip(EXPERT_LEAVES, ("w1", "w3", "w2"), strict=True))
"""What Mixtral's files call the projections of an expert."""


class SeparateExperts(nn.ModuleList):
    """The experts of a layer with linear layers of their own, called as transformers calls its fused ones.

    Args:
        gate_up: [experts, 2 * intermediate, hidden], gate first. down: [experts, hidden, intermediate]. The layers'
            weights are views of these.
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        gate, up = gate_up.chunk(2, 1)
        super().__init__(Expert(*matrices) for matrices in zip(gate, up, down, strict=True))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden] for x [tokens, hidden], and expert numbers and weights [tokens, top k]."""
        result = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, places = (ids == number).nonzero(as_tuple=True)
            if len(tokens):
                result = result.index_add(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        return result


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)), from weights [output_size, input_size]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def find_experts(block: nn.Module, run: Run) -> tuple[Experts, ...]:
    """The experts of a block that `SeparateExperts` computes as they do: no biases, silu(gate) * up.

    Args:
        block: with weights.
        run: runs it on some tokens.
    """
    calls: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=name: calls.update({n: (args, out)}))
        for name, module in block.named_modules()
        if _is_fused(module)
    ]
    with hooked(*hooks), torch.no_grad():
        run()
    return tuple(_equal_ones(block, calls))


def separate(block: nn.Module, experts: Sequence[Experts]) -> None:
    """Replace transformers' modules of experts by `SeparateExperts` with the same weights."""
    for found in experts:
        fused = block.get_submodule(found.name)
        assert isinstance(fused.gate_up_proj, Tensor)
        assert isinstance(fused.down_proj, Tensor)
        block.set_submodule(found.name, SeparateExperts(fused.gate_up_proj.data, fused.down_proj.data))


def stored_linear(weights: FloatWeights, name: str) -> str:
    """The name in the files of the linear layer `name`, which may be an expert's.

    Files that hold all experts of a layer in one tensor have none; there it is `name`, as msModelSlim writes it.
    """
    parent, _, leaf = name.rpartition(".")
    parents = (parent, parent.replace(f".{_MODULES[0]}.", f".{_MODULES[1]}."))
    for spelled in (f"{p}.{q}" for p, q in product(parents, (leaf, _LEAVES.get(leaf, leaf)))):
        if f"{spelled}.weight" in weights.tensors:
            return spelled
    return name


def stored_parameter(weights: FloatWeights, name: str) -> str:
    """The name in the files of the parameter `name`; `name` if it is not there, or not as one tensor."""
    other = name.replace(f".{_MODULES[0]}.", f".{_MODULES[1]}.")
    return next((found for found in (name, other) if found in weights.tensors), name)


def read_parameter(weights: FloatWeights, name: str) -> Tensor:
    """The parameter `name` of a transformers model, in its stored dtype.

    Raises:
        CalibrationError: it is not in the files under any name.
    """
    for stored in dict.fromkeys((name, name.replace(f".{_MODULES[0]}.", f".{_MODULES[1]}."))):
        if (found := weights.stored_name(stored)) in weights.tensors:
            return weights.read(found)
        if (match := _EXPERTS.fullmatch(stored)) is not None:
            for leaves in _PROJECTIONS[match[2]]:
                if f"{match[1]}.0.{leaves[0]}.weight" in weights.tensors:
                    return _stacked(weights, match[1], leaves)
    raise weights.missing(name)


def _stacked(weights: FloatWeights, experts: str, leaves: Sequence[str]) -> Tensor:
    prefix = f"{experts}."
    numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in weights.tensors if name.startswith(prefix)}
    return torch.stack(
        [
            torch.cat([weights.read(f"{prefix}{number}.{leaf}.weight") for leaf in leaves])
            for number in range(max(numbers) + 1)
        ]
    )


def _is_fused(module: nn.Module) -> bool:
    """Whether a module has the two tensors of fused experts and no other parameter."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if set(shapes) != set(_PROJECTIONS) or any(len(shape) != 3 for shape in shapes.values()):
        return False
    count, both, hidden = shapes["gate_up_proj"]
    return both % 2 == 0 and shapes["down_proj"] == (count, hidden, both // 2)


def _equal_ones(block: nn.Module, calls: Mapping[str, tuple[tuple[Tensor, ...], Tensor]]) -> Iterator[Experts]:
    """Those of the called modules of experts that `SeparateExperts` can take the place of."""
    for name, (arguments, expected) in calls.items():
        fused = block.get_submodule(name)
        assert isinstance(fused.gate_up_proj, Tensor)
        assert isinstance(fused.down_proj, Tensor)
        separated = SeparateExperts(fused.gate_up_proj.data, fused.down_proj.data)
        try:
            with torch.no_grad():
                found = separated(*arguments)
        except (IndexError, RuntimeError, TypeError):  # called in another way
            continue
        if isinstance(expected, Tensor) and torch.allclose(
            found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        ):
            yield Experts(name, len(fused.gate_up_proj))


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
