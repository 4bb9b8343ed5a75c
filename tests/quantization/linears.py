# SPDX-License-Identifier: Apache-2.0
"""Made-up linears: written as a checkpoint, loaded into vLLM's linear layers, computed by the reference."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear

from tests.linears import relative_error
from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

LEFT, RIGHT = 12, 16
IN = LEFT * RIGHT
KINDS = ["W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC", "W8A8_DYNAMIC"]


class Linear:
    """One linear of a made-up checkpoint and what it computes."""

    def __init__(
        self, out: int, kind: str, seed: int, groups: int = 1, offset: bool = False, bias: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.Generator().manual_seed(99)
        low, high = (-8, 8) if "W4A4" in kind else (-127, 128)
        self.kind = kind
        self.weight = torch.randint(low, high, (out, IN), dtype=torch.int8, generator=generator)
        self.weight_scale = torch.rand(out, groups, generator=generator) * 0.02
        self.weight_offset = torch.randn(out, groups, generator=generator) if offset else torch.zeros(out, groups)
        self.left_trans = torch.randn(LEFT, LEFT, generator=shared) / LEFT**0.5
        self.right_trans = torch.randn(RIGHT, RIGHT, generator=shared) / RIGHT**0.5
        self.clip_ratio = torch.tensor([0.93])
        self.bias = torch.randn(out, generator=generator) if bias else None

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ["weight", "weight_scale", "weight_offset"]
        if self.kind == "W4A4_FLATQUANT_DYNAMIC":
            names += ["left_trans", "right_trans", "clip_ratio"]
        names += ["bias"] if self.bias is not None else []
        return {name: getattr(self, name) for name in names}

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight_scale.squeeze(1)
        if self.kind == "W8A8_DYNAMIC":
            return reference.w8a8_linear(x, self.weight, scale, self.bias)
        flat = self.kind == "W4A4_FLATQUANT_DYNAMIC"
        return reference.flatquant_linear(
            x,
            self.weight,
            scale,
            self.left_trans if flat else None,
            self.right_trans if flat else None,
            self.clip_ratio.item() if flat else 1.0,
            self.bias,
            weight_offset=self.weight_offset.squeeze(1),
        )


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(y, expected) < 2e-3  # a flipped 4-bit rounding now and then


def inputs(tokens: int = 9) -> torch.Tensor:
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(5))


def column_layer(config: AscendW4A4Config, out: int, bias: bool = False) -> ColumnParallelLinear:
    """A column-parallel layer `m.proj`, not loaded."""
    return ColumnParallelLinear(IN, out, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.proj")


def merged_pair(make_config: Any) -> tuple[Any, Linear, Linear]:
    gate, up = Linear(16, KINDS[0], 0), Linear(16, KINDS[0], 1)
    config = make_config(gate_proj=gate, up_proj=up)
    layer = MergedColumnParallelLinear(
        IN, [16, 16], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
    )
    return layer, gate, up
