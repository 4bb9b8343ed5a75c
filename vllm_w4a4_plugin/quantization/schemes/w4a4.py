# SPDX-License-Identifier: Apache-2.0
"""What the schemes with int4 weights and integer activations share: packed weights and the fused operator."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.ops import cpu
from vllm_w4a4_plugin.ops.self_check import require_working_kernels
from vllm_w4a4_plugin.quantization.parameters.cpu import Int4Parameter

from .base import Layer, LayerShape, LinearScheme
from .cpu_activations import CpuActivations


class W4A4Scheme(CpuActivations, LinearScheme):
    """int4 weights x int4 activations, or int8 activations where the type or the user says so."""

    def __init__(self, plan: LayerPlan, on_packed: Callable[[], None]) -> None:
        super().__init__(plan, on_packed)
        self.choose_activation_bits(plan.quant_type)

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        require_working_kernels(shape.params_dtype)
        self._register_weight(layer, shape, weight_loader, Int4Parameter)
        self._register_scales(layer, shape, weight_loader)

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::{self.step_operator or 'flatquant_linear'}, {cpu.cpu_instruction_set()}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel()

    def _scale(self, layer: Layer) -> torch.Tensor:
        """[output_size] or [output_size, groups]."""
        return layer.weight_scale

    def _offset(self, layer: Layer) -> torch.Tensor | None:
        """The offsets, even if all are zero: compiled graphs stay valid when the next weights bring others."""
        return layer.weight_offset if self.spec.has_offset else None
