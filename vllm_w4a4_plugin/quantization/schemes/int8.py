# SPDX-License-Identifier: Apache-2.0
"""What schemes with int8 weights in our own layout share."""

from collections.abc import Callable
from typing import Any

from vllm_w4a4_plugin.checkpoint.types import WEIGHT
from vllm_w4a4_plugin.ops import cpu
from vllm_w4a4_plugin.quantization.parameters.cpu import Int8Parameter

from .base import Layer, LayerShape, LinearScheme


class Int8Scheme(LinearScheme):
    """int8 weights, packed as they arrive."""

    operator_name: str

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        weight = Int8Parameter.zeros(
            shape.sizes,
            input_parts=shape.input_parts,
            plan=self.plan,
            suffix=WEIGHT,
            weight_loader=weight_loader,
            on_packed=self.on_packed,
        )
        layer.register_parameter(WEIGHT, weight)

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::{self.operator_name}, {cpu.cpu_instruction_set()}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel()
