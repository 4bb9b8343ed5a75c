# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest: the way of 8-bit layers, and what calibration of other layers is compared with."""

from torch import Tensor

from vllm_w4a4_plugin.checkpoint.types import TypeSpec

from .quantized import InputQuantizer, InputTransform, QuantizedGroup
from .rounding import absmax_scale, round_to_nearest

IDENTITY = InputTransform()
LARGER_BY = 1.001  # sums in another order are no difference


def nearest(weight: Tensor, kind: TypeSpec, transform: InputTransform = IDENTITY) -> QuantizedGroup:
    """A group whose weights and activations are rounded to nearest, their full range covered.

    Args:
        weight: [output_size, input_size], transformed.
        kind: of the layers.
        transform: of the input.
    """
    scale = absmax_scale(weight, kind.weight_bits)
    codes = round_to_nearest(weight, scale, kind.weight_bits)
    return QuantizedGroup(InputQuantizer(kind.activation_bits, transform), weight, codes, scale, kind.weight_bits)


def layer_errors(quantized: QuantizedGroup, x: Tensor, exact: Tensor, sizes: list[int]) -> list[float]:
    """Relative error of each layer of a group.

    Args:
        quantized: the group.
        x: its input [tokens, input_size].
        exact: outputs [tokens, output_size] of all its layers without quantization.
        sizes: output size of each layer.
    """
    parts = zip(quantized.output(x).split(sizes, 1), exact.split(sizes, 1), strict=True)
    return [relative_error(found, wanted) for found, wanted in parts]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Mean over the tokens of |found - exact| / |exact|, for [..., channels].

    Of each token by itself: the few tokens with huge values would otherwise be all that counts.
    """
    error, size = (found - exact).norm(dim=-1), exact.norm(dim=-1)
    return (error / size.clamp_min(1e-6 * size.mean() + 1e-30)).mean().item()


def is_larger(error: float, than: float) -> bool:
    """Whether an error is larger than another one, or not a number."""
    return not error <= LARGER_BY * than
