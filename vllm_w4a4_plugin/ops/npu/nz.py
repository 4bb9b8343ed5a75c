# SPDX-License-Identifier: Apache-2.0
"""int4 weights in the order in which the NPU's cube unit takes them ("nZ"): one contiguous copy per tile, no transpose.

A weight [out, in] is cut into fractals of 16 outputs x 64 inputs, 512 bytes each. A fractal holds 16 rows of 32 bytes,
two inputs per byte, the even one in the low nibble (two's complement). Fractals are ordered with outputs fastest:
packed[in / 64][out / 16][16][32]. Rows and columns beyond the weight are zero.
"""

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

from .select import FRACTAL_INPUTS, FRACTAL_OUTPUTS


def nz_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Shape of the nZ form of an int4 weight [out_features, in_features], one byte per element."""
    return (
        -(-in_features // FRACTAL_INPUTS),
        -(-out_features // FRACTAL_OUTPUTS),
        FRACTAL_OUTPUTS,
        FRACTAL_INPUTS // 2,
    )


def pack_nz(weight: Tensor) -> Tensor:
    """uint8 nZ form of a weight, int8 [out, in] with values in [-8, 7]. Raises ValueError for anything else."""
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected int8 [out, in], found {weight.dtype} {list(weight.shape)}")
    low, high = (int(value) for value in torch.aminmax(weight))
    if low < INT4_MIN or high > INT4_MAX:
        raise ValueError(f"weight: expected values in [{INT4_MIN}, {INT4_MAX}], found [{low}, {high}]")
    inputs, outputs, rows, width = nz_shape(*weight.shape)
    padded = weight.new_zeros(outputs * rows, inputs * width * 2)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    nibbles = padded.view(torch.uint8) & 0xF
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return pairs.reshape(outputs, rows, inputs, width).permute(2, 0, 1, 3).contiguous()


def unpack_nz(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 weight [out_features, in_features] that `pack_nz` packed."""
    if packed.dtype != torch.uint8 or packed.shape != nz_shape(out_features, in_features):
        raise ValueError(
            f"packed: expected uint8 {list(nz_shape(out_features, in_features))} for {out_features} x {in_features}, "
            f"found {packed.dtype} {list(packed.shape)}"
        )
    pairs = packed.permute(1, 2, 0, 3).reshape(packed.shape[1] * FRACTAL_OUTPUTS, -1)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)
    # Sign extension: nibbles 8..15 are -8..-1.
    values = ((nibbles ^ 8).to(torch.int8) - 8)[:out_features, :in_features]
    return values.contiguous()
