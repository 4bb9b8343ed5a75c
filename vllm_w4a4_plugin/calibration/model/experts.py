# SPDX-License-Identifier: Apache-2.0
"""Weights that transformers keeps under another name, or in another form, than the files: experts and routers.

transformers computes the experts of a layer from two tensors, `experts.gate_up_proj` [experts, 2 * intermediate,
hidden] and `experts.down_proj` [experts, hidden, intermediate]. The files have each expert's matrices by themselves.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .weights import FloatWeights

_PROJECTIONS: Mapping[str, Sequence[Sequence[str]]] = {
    # of transformers -> those of an expert in the files of Qwen and others, and in Mixtral's
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_MODULES = ("mlp", "block_sparse_moe")
"""What transformers calls the module of experts and router, and what Mixtral's files call it."""


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
