# SPDX-License-Identifier: Apache-2.0
"""A group of linear layers as it is computed after quantization."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..transforms.kronecker import apply_kronecker, kronecker_inverse
from .rounding import quantize_tokens

ROWS_IN_FLOAT64 = 2048


@dataclass(frozen=True)
class InputTransform:
    """x -> (x * diagonal) kron(left, right) of tokens [tokens, n]; None is the identity.

    Attributes:
        diagonal: [n], folded into the norm that produces x.
        left: [M, M]; right: [N, N].
    """

    diagonal: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return apply_kronecker(x if self.diagonal is None else x * self.diagonal, self.left, self.right)

    def to(self, device: torch.device) -> "InputTransform":
        """The same on another device."""
        return InputTransform(*(None if t is None else t.to(device) for t in (self.diagonal, self.left, self.right)))


def inversely_transformed(weight: Tensor, transform: InputTransform) -> Tensor:
    """Weights whose product with the transformed input is that of `weight` [output_size, n] with the input."""
    inverse = kronecker_inverse(transform.left, transform.right)

    # In float64, a part at a time: float32 would lose as many digits as the factors' condition number has.
    def part(rows: Tensor) -> Tensor:
        rows = rows if transform.diagonal is None else rows / transform.diagonal
        return apply_kronecker(rows.double(), *inverse).float()

    return torch.cat([part(rows) for rows in weight.split(ROWS_IN_FLOAT64)])


@dataclass(frozen=True)
class InputQuantizer:
    """Dynamic per-token quantization of a group's input.

    Attributes:
        bits: of activations.
        transform: applied first.
        clip: activation clip ratio.
    """

    bits: int
    transform: InputTransform = field(default_factory=InputTransform)
    clip: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [tokens, n] as the quantized layer sees them: transformed, quantized and dequantized."""
        return quantize_tokens(self.transform(x), self.clip, self.bits)

    def to(self, device: torch.device) -> "InputQuantizer":
        """The same on another device."""
        return InputQuantizer(self.bits, self.transform.to(device), self.clip)


@dataclass(frozen=True)
class QuantizedGroup:
    """A group's weights, and how its input is quantized.

    Attributes:
        input: quantizer of the input.
        weight: [output_size, input_size], transformed; what the codes approximate.
        codes: integers of the same shape, as floats.
        scale: [output_size, 1].
        bits: of the codes.
    """

    input: InputQuantizer
    weight: Tensor
    codes: Tensor
    scale: Tensor
    bits: int

    def output(self, x: Tensor) -> Tensor:
        """Outputs [tokens, output_size], without biases, for x [tokens, input_size]."""
        return self.input(x) @ self.dequantized().t()

    def dequantized(self) -> Tensor:
        """[output_size, input_size]: codes * scale."""
        return self.codes * self.scale
