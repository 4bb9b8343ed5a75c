# SPDX-License-Identifier: Apache-2.0
"""What every scheme offers to the linear method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.layer import WEIGHT_OFFSET, WEIGHT_SCALE, LinearSpec
from vllm_w4a4_plugin.quantization.parameters import LayerSource, RowsParameter

Layer: TypeAlias = Any
"""A vLLM linear layer. `torch.nn.Module` would type each of its parameters as "Tensor or Module"."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a vLLM layer on this rank.

    Attributes:
        rows: output features on this rank, all shards together.
        columns: input features on this rank.
        all_columns: input features of the whole layer; larger than `columns` in a row-parallel layer.
        dtype: of activations and of the output.
    """

    rows: int
    columns: int
    all_columns: int
    dtype: torch.dtype

    @property
    def is_row_parallel(self) -> bool:
        """Whether the input features are split over ranks."""
        return self.columns != self.all_columns


class LinearScheme(ABC):
    """Parameters and computation of one quantized linear layer.

    Args:
        spec: the layer in the checkpoint (of fused shards: the first; they agree in all that is used here).
        source: where its tensors come from.
    """

    def __init__(self, spec: LinearSpec, source: LayerSource) -> None:
        self.spec, self.source = spec, source

    @abstractmethod
    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        """Register the layer's parameters, under their names in the checkpoint."""

    @abstractmethod
    def process_weights_after_loading(self, layer: Layer) -> None:
        """Make the loaded parameters ready; called once per loading, all parameters are filled."""

    @abstractmethod
    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output [..., rows] in x's dtype for x [..., columns]."""

    @property
    def packs_weights(self) -> bool:
        """Whether the weight is a `PackedParameter`, whose packing is worth a progress bar."""
        return True

    @property
    @abstractmethod
    def operator(self) -> str:
        """The operator and kernel that `apply` runs, for the start-up table."""

    @property
    def remark(self) -> str:
        """Anything a user should know of how this layer runs, "" if nothing."""
        return ""

    @abstractmethod
    def weight_bytes(self, layer: Layer) -> int:
        """Resident bytes of the weight matrix on this rank."""

    def _register_scales(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        """Register `weight_scale` and, where stored, `weight_offset`: float32 [rows] or [rows, groups]."""
        groups = self.spec.groups
        if groups > 1 and shape.is_row_parallel:
            group_size = shape.all_columns // groups
            if shape.columns % group_size:
                raise CheckpointError(
                    f"layer {self.source.prefix}: {shape.columns} input features per tensor-parallel rank are not a "
                    f"multiple of the group size {group_size}. Use a smaller --tensor-parallel-size."
                )
            groups = shape.columns // group_size
        size = (shape.rows,) if groups == 1 else (shape.rows, groups)
        for suffix in (WEIGHT_SCALE, *([WEIGHT_OFFSET] if self.spec.has_offset else [])):
            parameter = RowsParameter(
                torch.zeros(size, dtype=torch.float32),
                rows=shape.rows,
                columns=groups,
                source=self.source,
                suffix=suffix,
                weight_loader=weight_loader,
            )
            layer.register_parameter(suffix, parameter)
