# SPDX-License-Identifier: Apache-2.0
"""One decoder block that is loaded for quantization."""

import torch
from torch import Tensor, nn

from .streamed import StreamedModel
from .structure import Experts, Group
from .tracing import linear


class LoadedBlock:
    """A decoder block with its weights in float32; quantization changes them in place.

    Args:
        model: to which the block belongs.
        index: of the block.

    Attributes:
        module: the transformers module, on the model's device.
        name: its full name.
        groups: its linear layers, by the keys of their groups.
        experts: its experts that can be quantized.
    """

    def __init__(self, model: StreamedModel, index: int) -> None:
        self.model, self.index = model, index
        self.module = model.load_block(index)
        self.name, self.groups, self.experts = model.block_name(index), model.groups[index], model.experts[index]

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.model.device

    def run(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Output for hidden [rows, length, hidden], by a copy of the block if one is given."""
        return self.model.run_block(self.module if module is None else module, self.index, hidden)

    def linear(self, name: str) -> nn.Linear:
        """The linear layer `name`."""
        return linear(self.module, name)

    def weight(self, group: Group) -> Tensor:
        """The group's weights in one matrix [output_size, input_size]."""
        return torch.cat([self.linear(name).weight for name in group.linears])

    def output_sizes(self, group: Group) -> list[int]:
        """Output size of each layer of the group."""
        return [self.linear(name).out_features for name in group.linears]

    def stored_linear(self, name: str) -> str:
        """Full name in the files of the linear layer `name`."""
        return self.model.stored_linear(self.index, name)

    def stored_experts(self, experts: Experts) -> str:
        """Full name in the files of the module of experts."""
        return self.model.stored_experts(self.index, experts)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of the parameter `name` in the model's files."""
        return self.model.weights.dtype(f"{self.name}.{name}")
