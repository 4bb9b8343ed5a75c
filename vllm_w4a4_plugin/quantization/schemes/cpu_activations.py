# SPDX-License-Identifier: Apache-2.0
"""How wide the activations of W4A4 layers are on CPUs, which `VLLM_W4A4_ACTIVATION_BITS` decides."""

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.ops import cpu

WIDENED = "8-bit activations, not clipped (VLLM_W4A4_ACTIVATION_BITS=8)"
"""Remark on layers with int4 activations that run with int8 ones."""


class CpuActivations:
    """Mixin of the schemes whose type has int4 or int8 activations, and their remark in the start-up table.

    Attributes:
        activation_bits: 4 or 8.
        is_widened: whether a type with int4 activations runs with int8 ones, unclipped, because the user wants it.
    """

    def choose_activation_bits(self, quant_type: QuantType) -> None:
        """Set the attributes for layers of a type."""
        stored = quant_type.spec.activation_bits
        self.activation_bits = max(stored, envs.VLLM_W4A4_ACTIVATION_BITS)
        self.is_widened = self.activation_bits > stored

    @property
    def remark(self) -> str:
        """Anything that a user should know about how these layers run, "" if nothing."""
        remarks = []
        if self.is_widened:
            remarks.append(WIDENED)
        if cpu.cpu_instruction_set() == "portable":
            remarks.append("this CPU has none of the supported instruction sets; portable code is slow")
        return "; ".join(remarks)
