# SPDX-License-Identifier: Apache-2.0
"""Weights to and from the layout of the CPU kernels (csrc/cpu/layout.h)."""

import torch
from torch import Tensor

from . import arena
from .cpu import load_library
from .layout import packed_int4_shape


def zeros(shape: tuple[int, int, int], dtype: torch.dtype, count: int | None = None) -> Tensor:
    """A packed weight [tiles, blocks, bytes of a block], all bytes 0, each tile touched first by the thread that
    multiplies it: on machines with several NUMA nodes that is where its memory is placed. In huge pages, if there are.

    Args:
        shape: `packed_int4_shape` or `packed_int8_shape`.
        dtype: int8 or uint8.
        count: of weights in one tensor [count, tiles, blocks, bytes of a block], as of experts, whose tiles are spread
            over the threads in order. None for a single weight without that dimension.
    """
    tiles, blocks, block_bytes = shape
    together = (tiles * (1 if count is None else count), blocks, block_bytes)
    if torch.get_default_device().type != "cpu":
        packed = torch.empty(together, dtype=dtype)
    else:
        packed = arena.empty(together, dtype)
        torch.ops.vllm_w4a4.zero_tiles_(packed)
    return packed if count is None else packed.view(count, *shape)


def pack_int4(weight: Tensor) -> Tensor:
    """Pack int8 [out, in], values in [-8, 7], into uint8 `packed_int4_shape(out, in)`: half a byte per value.

    Raises:
        RuntimeError: a value is outside int4; the message gives it with its row and column.
    """
    packed = zeros(packed_int4_shape(weight.shape[0], weight.shape[-1]), torch.uint8)
    pack_int4_rows_(packed, weight, 0)
    return packed


def pack_int4_rows_(packed: Tensor, weight: Tensor, first_row: int) -> None:
    """Pack `weight`, int8 [n, in], in place into the n rows of a packed weight that start at `first_row`."""
    load_library()
    torch.ops.vllm_w4a4.pack_int4_rows_(packed, weight, first_row)


def pack_int8_rows_(packed: Tensor, weight: Tensor, first_row: int) -> None:
    """Pack `weight`, int8 [n, in], in place into the n rows of a packed int8 weight that start at `first_row`."""
    load_library()
    torch.ops.vllm_w4a4.pack_int8_rows_(packed, weight, first_row)


def unpack_int4(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_int4`: int8 [out_features, in_features]."""
    load_library()
    return torch.ops.vllm_w4a4.unpack_int4(packed, out_features, in_features)
