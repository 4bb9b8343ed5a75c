# SPDX-License-Identifier: Apache-2.0
"""Made-up linears of every type, for row-parallel layers."""

from typing import Any

import torch

from tests.quantization.linears import IN, KINDS, Linear
from tests.quantization.typed_linears import make

TYPES = [
    *KINDS, "W4A8_DYNAMIC", "W4A8_FLATQUANT_DYNAMIC", "W8A8_FLATQUANT_DYNAMIC", "W8A8", "W8A16", "W4A16", "FLOAT",
]  # fmt: skip


class Float:
    """A linear that is not quantized."""

    kind = "FLOAT"

    def __init__(self, out: int, bias: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.stored = {"weight": torch.randn(out, IN, generator=generator)}
        if bias:
            self.stored["bias"] = torch.randn(out, generator=generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.stored

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.double(), *(tensor.double() for tensor in self.stored.values())).float()


def made(kind: str, out: int, groups: int = 1, bias: bool = False) -> Any:
    """A linear of one of TYPES; 12 groups of scales where the type is not one of KINDS and has several."""
    if kind == "FLOAT":
        return Float(out, bias)
    if kind in KINDS:
        return Linear(out, kind, 0, groups=groups, bias=bias)
    return make(kind, out, 3, "groups" if groups > 1 else "", bias)
