# SPDX-License-Identifier: Apache-2.0
"""What the schemes with int4 weights and integer activations share: packed weights and the fused operator."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.types import WEIGHT
from vllm_w4a4_plugin.ops import cpu
from vllm_w4a4_plugin.ops.self_check import require_working_kernels
from vllm_w4a4_plugin.quantization.parameters.cpu import Int4Parameter

from .base import WIDENED, Layer, LayerShape, LinearScheme


class W4A4Scheme(LinearScheme):
    """int4 weights x int4 activations, or int8 activations where the type or the user says so.

    Attributes:
        activation_bits: 4 or 8.
        is_widened: whether a type with int4 activations runs with int8 ones, unclipped, because the user wants it.
    """

    def __init__(self, plan: LayerPlan, on_packed: Callable[[], None]) -> None:
        super().__init__(plan, on_packed)
        stored = plan.quant_type.spec.activation_bits
        self.activation_bits = max(stored, envs.VLLM_W4A4_ACTIVATION_BITS)
        self.is_widened = self.activation_bits > stored

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        require_working_kernels(shape.params_dtype)
        weight = Int4Parameter.zeros(
            shape.sizes,
            input_parts=shape.input_parts,
            plan=self.plan,
            suffix=WEIGHT,
            weight_loader=weight_loader,
            on_packed=self.on_packed,
        )
        layer.register_parameter(WEIGHT, weight)
        self._register_scales(layer, shape, weight_loader)

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::{self.step_operator or 'flatquant_linear'}, {cpu.cpu_instruction_set()}"

    @property
    def remark(self) -> str:
        remarks = []
        if self.is_widened:
            remarks.append(WIDENED)
        if cpu.cpu_instruction_set() == "portable":
            remarks.append("this CPU has none of the supported instruction sets; portable code is slow")
        return "; ".join(remarks)

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel()

    def _scale(self, layer: Layer) -> torch.Tensor:
        """[output_size] or [output_size, groups]."""
        return layer.weight_scale

    def _offset(self, layer: Layer) -> torch.Tensor | None:
        """The offsets, even if all are zero: compiled graphs stay valid when the next weights bring others."""
        return layer.weight_offset if self.spec.has_offset else None
