# SPDX-License-Identifier: Apache-2.0
"""Made-up linears of the types that checkpoints mix with W4A4, with what they compute, in float64."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tests.quantization.linears import IN, LEFT, RIGHT

TRANSFORM = {
    "left_trans": torch.randn(LEFT, LEFT, generator=torch.Generator().manual_seed(1)) / LEFT**0.5,
    "right_trans": torch.randn(RIGHT, RIGHT, generator=torch.Generator().manual_seed(2)) / RIGHT**0.5,
    "clip_ratio": torch.tensor([0.93]),
}
INPUT_SCALE, INPUT_OFFSET = torch.tensor([0.013]), torch.tensor([-37.0])


@dataclass
class Stored:
    """A linear layer of a made-up checkpoint.

    Attributes:
        kind: quant type.
        weight: as floats [output_size, input_size], what its codes and scales stand for.
        stored: its tensors.
        bias: [output_size] float64, zeros where there is none; one of W8A8 may be within the codes only.
    """

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor
    stored: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.stored)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        if self.kind == "W8A8":
            codes = (x / INPUT_SCALE.double() + INPUT_OFFSET.double()).round().clamp(-128, 127)
            x = (codes - INPUT_OFFSET.double()) * INPUT_SCALE.double()
        elif self.kind.endswith("DYNAMIC"):
            clip = 1.0
            if "FLATQUANT" in self.kind:
                x = x @ torch.kron(TRANSFORM["left_trans"], TRANSFORM["right_trans"]).double()
                clip = TRANSFORM["clip_ratio"].double()
            scale = clip * x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round().clamp(-127, 127) * scale
        return (x @ self.weight.T + self.bias).float()


def make(kind: str, out: int, seed: int, variant: str = "", bias: bool = False) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if kind.startswith("W4") else (-128, 128)
    codes = torch.randint(low, high, (out, IN), dtype=torch.int8, generator=generator)
    groups = 12 if variant in ("groups", "offset", "second") else 1
    scale = torch.rand(out, groups, generator=generator) * 0.01 + 1e-3
    offset = torch.randn(out, groups, generator=generator) if variant == "offset" else torch.zeros(out, groups)
    wide_scale, wide_offset = (t.double().repeat_interleave(IN // groups, 1) for t in (scale, offset))
    weight = (codes - wide_offset) * wide_scale
    values = torch.randn(out, generator=generator) if bias else torch.zeros(out)
    stored: dict[str, torch.Tensor] = {"weight": codes, "weight_scale": scale, "weight_offset": offset}
    if kind == "W8A8":
        deq_scale = INPUT_SCALE * scale[:, 0]
        quant_bias = (values / deq_scale - codes.float().sum(1) * INPUT_OFFSET).round().int()
        as_integers = deq_scale.view(torch.int32).long() if variant == "integers" else deq_scale
        stored = {"weight": codes, "input_scale": INPUT_SCALE, "input_offset": INPUT_OFFSET}
        stored |= {"quant_bias": quant_bias, "deq_scale": as_integers}
        if variant == "scales":
            stored |= {"weight_scale": scale, "weight_offset": offset}
        values = quant_bias.double() * deq_scale.double() + (codes.double().sum(1) * INPUT_OFFSET) * deq_scale.double()
        weight = codes.double() * (deq_scale.double() / INPUT_SCALE.double())[:, None]
    if variant == "second":
        first = torch.rand(out, 1, generator=generator) + 0.5
        stored["weight_scale"], stored["weight_offset"] = first, torch.zeros(out, 1)
        stored["weight_scale_second"], stored["weight_offset_second"] = scale / first, offset
    if variant == "packed":
        stored["weight"] = ((codes[0::2] & 15) | (codes[1::2] << 4)).to(torch.int8)
        if kind.startswith("W4A8"):
            stored["scale_bias"] = 8 * weight.sum(1, keepdim=True).float()
    if "FLATQUANT" in kind:
        stored |= TRANSFORM
    if bias:
        stored["bias"] = torch.full((out,), 1e6) if kind == "W8A8" else values  # W8A8 has it in quant_bias
    return Stored(kind, weight, values.double(), {name: t.contiguous().clone() for name, t in stored.items()})
