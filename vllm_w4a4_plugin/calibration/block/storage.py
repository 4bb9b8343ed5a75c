# SPDX-License-Identifier: Apache-2.0
"""The tensors of a quantized block as its checkpoint stores them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import (
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)

from ..model.block import LoadedBlock
from ..model.structure import Group
from .quantized import InputQuantizer, QuantizedGroup


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear layer.

    Attributes:
        kind: its quant type.
        tensors: by suffix (`weight`, `weight_scale`, ...), on CPU.
    """

    kind: QuantType
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def stored_linears(
    block: LoadedBlock, group: Group, kind: QuantType, quantized: QuantizedGroup
) -> dict[str, StoredLinear]:
    """The layers of a quantized group, by their names in the block."""
    sizes = block.output_sizes(group)
    parts = zip(group.linears, quantized.codes.split(sizes), quantized.scale.split(sizes), strict=True)
    return {
        name: StoredLinear(kind, layer_tensors(kind, codes, scale, quantized.input)) for name, codes, scale in parts
    }


def collect_tensors(
    block: LoadedBlock, linears: Mapping[str, StoredLinear]
) -> tuple[dict[str, Tensor], dict[str, QuantType]]:
    """All tensors of a block and their quant types, by full name.

    Quantized linear layers come first, in order of execution, then experts, then everything else in stored order.
    """
    tensors: dict[str, Tensor] = {}
    types: dict[str, QuantType] = {}
    names = [name for group in block.groups.values() for name in group.linears]
    for name in (*names, *(name for experts in block.experts for name in experts.all_linears)):
        if name in linears:
            for suffix, tensor in linears[name].tensors.items():
                full = f"{block.stored_linear(name)}.{suffix}"
                tensors[full], types[full] = tensor, linears[name].kind
    replaced = [e for e in block.experts if e.all_linears[0] in linears]
    prefixes = tuple(f"{block.stored_experts(experts)}." for experts in replaced)
    parameters = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
    for full in block.model.weights.tensors:
        local = full.removeprefix(block.name + ".")
        if local == full or full in tensors or full.startswith(prefixes):
            continue
        if local in parameters:
            tensors[full] = parameters[local].detach().to("cpu", block.stored_dtype(local))
        else:  # experts, which transformers keeps under other names and which nothing here changes
            tensors[full] = block.model.weights.read(full)
        types[full] = QuantType.FLOAT
    return tensors, types


def layer_tensors(kind: QuantType, codes: Tensor, scale: Tensor, quantizer: InputQuantizer) -> dict[str, Tensor]:
    """The tensors that layers of this type have, in msModelSlim's order; a factor that is the identity is left out."""
    known = {
        WEIGHT: codes.to(torch.int8),
        WEIGHT_SCALE: scale.float(),
        WEIGHT_OFFSET: torch.zeros_like(scale, dtype=torch.float32),
        CLIP_RATIO: torch.tensor([quantizer.clip], dtype=torch.float32),
        LEFT_TRANS: quantizer.transform.left,
        RIGHT_TRANS: quantizer.transform.right,
    }
    return {
        suffix: tensor.to("cpu", copy=True).contiguous()
        for suffix, tensor in known.items()
        if tensor is not None and kind.spec.tensor(suffix)
    }
