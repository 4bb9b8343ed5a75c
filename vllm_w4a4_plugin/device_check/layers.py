# SPDX-License-Identifier: Apache-2.0
"""The layers that the steps of a check run on: from a step's arguments to operands and their form on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_w4a4_plugin.ops.npu.select import Kernel
from vllm_w4a4_plugin.ops.npu.trial import DeviceLinear, Operands, make_operands

from .plan import Step


@dataclass(frozen=True)
class Session:
    """A worker's device.

    Attributes:
        device: that computes.
        npu: `torch.npu`.
    """

    device: torch.device
    npu: Any

    def on_cpu(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies on the CPU, after the device has finished."""
        self.npu.synchronize()
        return tuple(tensor.cpu() for tensor in tensors)


def operands_of(step: Step, tokens: int, *, is_whole: bool = False) -> Operands:
    """The layer of a step, with this many tokens.

    Args:
        step: with `sizes`, `factors` and `dtype`, perhaps `clip_ratio` and `has_bias`.
        tokens: of x.
        is_whole: tokens as they are quantized, before a row-parallel layer divides them; the weight is then small.
    """
    arguments = step.arguments
    output_size, input_size = arguments["sizes"]
    sizes = (16, arguments.get("whole_input", input_size)) if is_whole else (output_size, input_size)
    return make_operands(
        tokens,
        sizes,
        tuple(arguments["factors"]),
        getattr(torch, arguments["dtype"]),
        clip_ratio=arguments.get("clip_ratio", 1.0),
        has_bias=arguments.get("has_bias", False),
        seed=tokens,
    )


def on_device(step: Step, operands: Operands, session: Session) -> DeviceLinear:
    """The operands in the form of the step's kernel."""
    return DeviceLinear(Kernel(step.kernel), operands, session.device)


def runnable(step: Step, operands: Operands, session: Session) -> Callable[[Tensor], Tensor]:
    """What the layer of a step computes on this device: all of it, or of a row-parallel layer the quantization."""
    layer = on_device(step, operands, session)
    if operands.x.shape[1] == step.arguments["sizes"][1]:
        return layer
    return lambda x: layer.quantize(x)[1]
