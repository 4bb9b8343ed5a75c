# SPDX-License-Identifier: Apache-2.0
"""Made-up W4A4 linears: written as a checkpoint, loaded into vllm-ascend's layers, computed by the reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import linears
from tests.npu.processes import MICRO
from vllm_w4a4_plugin.capacity.kernels import kernel_of
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.quantization.ascend_config import AscendW4A4ModelSlimConfig

FLATQUANT, DYNAMIC = "W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC"

SAME_ROUNDINGS = 8e-3
"""Relative error between the operators and the reference with their roundings: bfloat16 outputs, few flips."""

OTHER_ROUNDINGS = 6e-2
"""Between an operator path in bfloat16 and the formula in float32: more int4 values fall the other way."""


@dataclass
class Linear:
    """One linear of a checkpoint. `left`, `right`: sizes of the factors; None leaves the tensor out."""

    out: int
    features: int
    left: int | None = 12
    right: int | None = 16
    kind: str = FLATQUANT
    clip: float = 0.97
    bias: bool = False
    offset: float = 0.0
    groups: int = 1
    seed: int = 0
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shared = torch.Generator().manual_seed(99)  # fused shards have one transform
        t = self.values
        t["weight"] = torch.randint(-8, 8, (self.out, self.features), dtype=torch.int8, generator=generator)
        t["weight_scale"] = torch.rand(self.out, self.groups, generator=generator) * 0.02 + 1e-3
        t["weight_offset"] = torch.full((self.out, self.groups), self.offset)
        if self.kind == FLATQUANT:
            for name, size in (("left_trans", self.left), ("right_trans", self.right)):
                if size is not None:
                    t[name] = torch.randn(size, size, generator=shared) / size**0.5
            t["clip_ratio"] = torch.tensor([self.clip])
        if self.bias:
            t["bias"] = torch.randn(self.out, generator=generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.values

    def expected(self, x: torch.Tensor, with_npu_roundings: bool = True) -> torch.Tensor:
        """The reference's output: of the two NPU operators, or of the formula in float32."""
        t = self.values
        left, right, bias = t.get("left_trans"), t.get("right_trans"), t.get("bias")
        bias = bias.to(x.dtype) if bias is not None else None  # vLLM keeps biases in the model's dtype
        scale = t["weight_scale"].squeeze(1)
        if with_npu_roundings:
            return reference.flatquant_linear_npu(x, t["weight"], scale, left, right, self.clip, bias)
        clip = self.clip if self.kind == FLATQUANT else 1.0
        return reference.flatquant_linear(x.float(), t["weight"], scale, left, right, clip, bias).to(x.dtype)


def open_config(directory: Path, layers: Mapping[str, Linear]) -> AscendW4A4ModelSlimConfig:
    """The linears as `model.layers.0.<name>` of a checkpoint, opened as vLLM opens one."""
    named = {f"model.layers.0.{name}": linear for name, linear in layers.items()}
    return linears.open_config(AscendW4A4ModelSlimConfig(), directory, named)


def inputs(features: int, tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(5)).to(dtype)


def output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[0]


def planned_kernel(linear: Linear) -> tuple[str, str]:
    """What `vllm-w4a4 doctor` would have said."""
    kind = QuantType(linear.kind)
    layer = LinearSpec("up", kind, linear.out, linear.features, linear.groups, linear.left, linear.right)
    choice = kernel_of(layer, read_model(MICRO), 1)
    return choice.kernel, choice.reason
