# SPDX-License-Identifier: Apache-2.0
"""What schemes with int8 weights in our own layout share."""

from collections.abc import Callable
from typing import Any

from vllm_w4a4_plugin.ops import cpu
from vllm_w4a4_plugin.quantization.parameters.cpu import Int8Parameter

from .base import Layer, LayerShape, LinearScheme


class Int8Scheme(LinearScheme):
    """int8 weights, packed as they arrive."""

    operator_name: str

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        self._register_weight(layer, shape, weight_loader, Int8Parameter)

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::{self.operator_name}, {cpu.cpu_instruction_set()}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel()
