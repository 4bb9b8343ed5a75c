# SPDX-License-Identifier: Apache-2.0
"""The quantized model as a trainable one: its blocks are built from the stored tensors, and stored again at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vllm_w4a4_plugin.checkpoint import QuantType

from ..model.streamed import StreamedModel
from .linear import RelativeWeight, TrainableLinear


@dataclass
class QuantizedBlock:
    """What distillation starts from.

    Attributes:
        tensors: as stored, by full name.
        types: quant type by full name of the tensor.
        groups: linear layers, by their names in the block, that share an input.
    """

    tensors: dict[str, Tensor]
    types: Mapping[str, QuantType]
    groups: Sequence[Sequence[str]]


class StudentBlock:
    """A block whose scales, clips, transforms and norms require gradients.

    Args:
        model: the float model.
        index: of the block.
        quantized: the block's stored tensors.

    Attributes:
        module: the transformers module.
    """

    def __init__(self, model: StreamedModel, index: int, quantized: QuantizedBlock) -> None:
        self.name, self.quantized, self.device = model.block_name(index), quantized, model.device
        self.stored_linear = partial(model.stored_linear, index)
        self.module = model.load_block(index)
        self._load_parameters()
        self._replace_linears()
        self._share_in_groups()

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def stored(self) -> dict[str, Tensor]:
        """All tensors of the block as they are to be stored, by full name."""
        tensors = dict(self.quantized.tensors)
        for local, part in self.module.named_modules():
            if isinstance(part, TrainableLinear):
                name = self.stored_linear(local)
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in part.stored().items()}
            elif parametrize.is_parametrized(part, "weight"):
                full = f"{self.name}.{local}.weight"
                assert isinstance(part.weight, Tensor)
                tensors[full] = part.weight.detach().to("cpu", tensors[full].dtype)
        return tensors

    def _load_parameters(self) -> None:
        """Load everything but codes; norms become trainable."""
        for local, parameter in list(self.module.named_parameters()):
            tensor = self.quantized.tensors.get(f"{self.name}.{local}")
            if tensor is None or tensor.dtype == torch.int8:
                continue
            parameter.data = tensor.to(parameter)
            owner, _, leaf = local.rpartition(".")
            if parameter.ndim == 1 and leaf == "weight":
                weight = RelativeWeight(tensor.to(self.device))
                parametrize.register_parametrization(self.module.get_submodule(owner), leaf, weight)
                self.module.get_parameter(f"{owner}.parametrizations.{leaf}.original").requires_grad_(True)

    def _replace_linears(self) -> None:
        own: dict[str, dict[str, Tensor]] = {}
        for full, tensor in self.quantized.tensors.items():
            name, _, suffix = full.rpartition(".")
            own.setdefault(name, {})[suffix] = tensor
        for local, module in list(self.module.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            name = self.stored_linear(local)
            kind = self.quantized.types.get(f"{name}.weight", QuantType.FLOAT)
            if kind.spec.is_quantized:
                tensors = {suffix: tensor.to(self.device) for suffix, tensor in own[name].items()}
                trainable = TrainableLinear(tensors, kind.spec.activation_bits, module.bias)
                self.module.set_submodule(local, trainable)

    def _share_in_groups(self) -> None:
        for group in self.quantized.groups:
            members = [m for m in map(self.module.get_submodule, group) if isinstance(m, TrainableLinear)]
            for member in members[1:]:
                member.share_with(members[0])
