# SPDX-License-Identifier: Apache-2.0
"""The linear method that vLLM calls for every quantized layer."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)

from vllm_w4a4_plugin.checkpoint import CheckpointError

from .dummy import fill_with_plausible_values
from .output_part import OutputPart
from .parameters.base import require_filled, settle, unpacking
from .schemes import Layer, LayerShape, LinearScheme

if TYPE_CHECKING:
    from .report import LoadReport


@register_weight_loader_v2_supported_method
class AscendW4A4LinearMethod(LinearMethodBase):
    """Connects one vLLM linear layer with its scheme.

    Args:
        scheme: of this layer; not shared with others.
        report: is told when the layer has been created and when it has been loaded.
        expect_weights: False if vLLM fills parameters with dummy values.
    """

    def __init__(self, scheme: LinearScheme, report: "LoadReport", expect_weights: bool) -> None:
        self.scheme, self.report, self.expect_weights = scheme, report, expect_weights
        self.part: OutputPart | None = None

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        spec, prefix = self.scheme.spec, self.scheme.plan.prefix
        if spec.input_size != input_size:
            raise CheckpointError(
                f"layer {prefix}, tensor {spec.name}.weight: expected {input_size} input features "
                f"(config.json), found {spec.input_size}. config.json and weights come from different models."
            )
        weight_loader = extra_weight_attrs["weight_loader"]
        if isinstance(layer, ReplicatedLinear):
            # Its loader copies only tensors of the same shape as the parameter; a packed weight has another shape.
            def weight_loader(param: Any, loaded_weight: torch.Tensor) -> None:
                param.load_replicated_weight(loaded_weight)

        shape = LayerShape(sum(output_partition_sizes), input_size_per_partition, input_size, params_dtype)
        if shape.is_row_parallel and not self.scheme.keeps_input_parts:
            part = self.part = OutputPart.of_rank(layer.tp_rank, layer.tp_size, output_size)
            whole = LayerShape(part.count, input_size, input_size, params_dtype)
            self.scheme.create_weights(layer, whole, unpacking(part.weight_loader))
            self.scheme.sent_bytes = self.scheme.gathered_bytes(input_size_per_partition, params_dtype)
        else:
            self.scheme.create_weights(layer, shape, unpacking(weight_loader))
        self.report.expect(self.scheme)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.expect_weights:
            self._check_filled(layer)
        else:
            fill_with_plausible_values(layer)
        self.scheme.process_weights_after_loading(layer)
        settle(layer)
        self.report.ready(self.scheme, layer)

    def begin_with(self, operator: str) -> bool:
        """Let the layer's calls bring the step before it (`steps.Normed`, `steps.Activated`) in place of a tensor.

        Args:
            operator: that has this step and the layer in one.

        Returns:
            Whether the scheme has the operator and gets whole tokens; if not, nothing changes.
        """
        if self.part is not None or not self.scheme.begins_with_steps:
            return False
        self.scheme.step_operator = operator
        return True

    def apply(self, layer: torch.nn.Module, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.part is None:
            return self.scheme.apply(layer, x, bias)
        return self.part.among_all(self.scheme.multiply_gathered(layer, x, self.part.bias(layer)))

    def _check_filled(self, layer: torch.nn.Module) -> None:
        """Raise if a parameter of the layer was not filled, or a bias was not expected."""
        prefix, spec = self.scheme.plan.prefix, self.scheme.spec
        require_filled(layer, prefix)
        if spec.has_bias != (getattr(layer, "bias", None) is not None):
            raise CheckpointError(
                f"layer {prefix}, tensor {spec.name}.bias: checkpoint has {'one' if spec.has_bias else 'none'}, the "
                f"model has {'none' if spec.has_bias else 'one'}. config.json and weights come from different models."
            )
