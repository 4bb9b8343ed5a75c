# SPDX-License-Identifier: Apache-2.0
"""The interface of a scheme, through which the linear method uses it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import (
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_OFFSET_SECOND,
    WEIGHT_SCALE,
    WEIGHT_SCALE_SECOND,
)
from vllm_w4a4_plugin.quantization.parameters.base import MatrixParameter, PackedParameter

Layer: TypeAlias = Any
"""A vLLM linear layer. `torch.nn.Module` would type each of its parameters as "Tensor or Module"."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a vLLM layer, in vLLM's words.

    Attributes:
        output_size_per_partition: output features on this rank, all shards together.
        input_size_per_partition: input features on this rank.
        input_size: input features of the whole layer; larger than on this rank in a row-parallel layer.
        params_dtype: of activations and of the output.
    """

    output_size_per_partition: int
    input_size_per_partition: int
    input_size: int
    params_dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """(output_size, input_size) of the weight on this rank."""
        return self.output_size_per_partition, self.input_size_per_partition

    @property
    def input_parts(self) -> int:
        """Number of ranks over which the input features are split."""
        return self.input_size // self.input_size_per_partition

    @property
    def part_bytes(self) -> int:
        """Bytes of this rank's part of a token in a row-parallel layer, 0 in others."""
        return self.input_size_per_partition * self.params_dtype.itemsize if self.is_row_parallel else 0

    @property
    def is_row_parallel(self) -> bool:
        """Whether the input features are split over ranks: vLLM's RowParallelLinear, of which a scheme has a part."""
        return self.input_parts > 1


class LinearScheme(ABC):
    """Parameters and computation of one quantized linear layer.

    Args:
        plan: of the layer; its `spec` is not None.
        on_packed: called after each weight tensor that was packed.
    """

    sent_bytes = 0
    """Bytes per token that a rank sends to each other one before the product."""

    begins_with_steps = False
    """Whether `apply` also takes what `quantization.steps` has in place of a tensor."""

    step_operator = ""
    """The operator that `apply` runs where it is given such a step, "" if it is not."""

    def __init__(self, plan: LayerPlan, on_packed: Callable[[], None]) -> None:
        self.plan, self.on_packed = plan, on_packed

    @property
    def spec(self) -> LinearSpec:
        """The layer in the checkpoint; of a fused layer the first shard, from which others differ in output_size."""
        assert self.plan.spec is not None
        return self.plan.spec

    @abstractmethod
    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        """Register the layer's parameters, under their names in the checkpoint."""

    def process_weights_after_loading(self, layer: Layer) -> None:  # noqa: B027 - most schemes have nothing to do
        """Prepare the parameters for `apply`; called after each load, when all of them are filled.

        Inside vllm-ascend, a trainer that loads weights in place does not call it; parameters do what must happen then.
        """

    @abstractmethod
    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output [..., output_size] in x's dtype for x [..., input_size], sizes on this rank."""

    def multiply_gathered(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`apply` for tokens of which every rank has a part: [..., output_size] for x [..., input_size / ranks].

        Here the ranks send each other their parts as they are.
        """
        return self.apply(layer, tensor_model_parallel_all_gather(x), bias)

    def gathered_bytes(self, features: int, dtype: torch.dtype) -> int:
        """Bytes per token that a rank sends to each other one in `multiply_gathered`, of its `features` of `dtype`."""
        return features * dtype.itemsize

    @property
    def keeps_input_parts(self) -> bool:
        """Whether a rank of a row-parallel layer multiplies its own part of each token, instead of whole tokens."""
        return envs.VLLM_W4A4_LOCAL_SCALES and not self.plan.quant_type.spec.has_transform

    @property
    def packs_weights(self) -> bool:
        """Whether the weight is a `PackedParameter`, whose packing the progress counts."""
        return True

    @property
    @abstractmethod
    def operator(self) -> str:
        """The operator and kernel that `apply` runs, for the start-up table."""

    @property
    def remark(self) -> str:
        """Anything that a user should know about how this layer runs, "" if nothing."""
        return ""

    @abstractmethod
    def weight_bytes(self, layer: Layer) -> int:
        """Resident bytes of the weight matrix on this rank."""

    def _register_weight(
        self,
        layer: Layer,
        shape: LayerShape,
        weight_loader: Callable[..., Any],
        parameter_class: type[PackedParameter],
        **options: Any,
    ) -> None:
        """Register `weight`, which is packed as it arrives.

        Args:
            layer, shape, weight_loader: of `create_weights`.
            parameter_class: the form in which the weight is kept.
            options: of its `zeros`.
        """
        weight = parameter_class.zeros(
            shape.sizes,
            input_parts=shape.input_parts,
            plan=self.plan,
            suffix=WEIGHT,
            weight_loader=weight_loader,
            on_packed=self.on_packed,
            **options,
        )
        layer.register_parameter(WEIGHT, weight)

    def _register_scales(
        self,
        layer: Layer,
        shape: LayerShape,
        weight_loader: Callable[..., Any],
        offset_class: type[MatrixParameter] = MatrixParameter,
    ) -> None:
        """Register `weight_scale` and what is stored of its kind, all float32 [output_size(, groups)]."""
        present = {
            WEIGHT_SCALE: True,
            WEIGHT_OFFSET: self.spec.has_offset,
            WEIGHT_SCALE_SECOND: self.spec.has_second_scale,
            WEIGHT_OFFSET_SECOND: self.spec.has_second_offset,
        }
        first_groups = 1 if self.spec.has_second_scale else self.spec.groups
        for suffix in (suffix for suffix, is_present in present.items() if is_present):
            stored = first_groups if suffix in (WEIGHT_SCALE, WEIGHT_OFFSET) else self.spec.groups
            groups = self._groups_on_rank(shape, stored)
            parameter_class = offset_class if suffix in (WEIGHT_OFFSET, WEIGHT_OFFSET_SECOND) else MatrixParameter
            rows = shape.output_size_per_partition
            parameter = parameter_class(
                torch.zeros((rows,) if groups == 1 else (rows, groups), dtype=torch.float32),
                sizes=(rows, groups),
                input_parts=stored // groups,
                plan=self.plan,
                suffix=suffix,
                weight_loader=weight_loader,
            )
            layer.register_parameter(suffix, parameter)

    def _groups_on_rank(self, shape: LayerShape, groups: int) -> int:
        """How many of a row's scale groups are on this rank.

        Raises:
            CheckpointError: a group would be divided.
        """
        if groups == 1 or not shape.is_row_parallel:
            return groups
        group_size = shape.input_size // groups
        if shape.input_size_per_partition % group_size:
            raise CheckpointError(
                f"layer {self.plan.prefix}: {shape.input_size_per_partition} input features per tensor-parallel "
                f"rank are not a multiple of the group size {group_size}. Use a smaller --tensor-parallel-size."
            )
        return shape.input_size_per_partition // group_size
