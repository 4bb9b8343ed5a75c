# SPDX-License-Identifier: Apache-2.0
"""Weights in the layout of the CPU kernels."""

from typing import Any, Self

import torch

from vllm_w4a4_plugin.checkpoint.packed import unpack_rows
from vllm_w4a4_plugin.ops import packing
from vllm_w4a4_plugin.ops.layout import INT4_TILE_ROWS, packed_int4_shape, packed_int8_shape

from .base import PackedParameter


class Int4Parameter(PackedParameter):
    """An int4 weight [output_size, input_size], two values per byte.

    Declared int8, the dtype of the checkpoint's tensors, so that vLLM sees no dtype change on loading.
    """

    @classmethod
    def zeros(cls, sizes: tuple[int, int], **kwargs: Any) -> Self:
        return cls(packing.zeros(packed_int4_shape(*sizes), torch.int8), sizes=sizes, **kwargs)

    def _unpacked(self, matrix: torch.Tensor, rows: int) -> torch.Tensor:
        is_packed = self.plan.quant_type.spec.may_be_packed and 2 * matrix.shape[0] == rows
        return unpack_rows(matrix) if is_packed else matrix

    def _rows(self, first_row: int, rows: int) -> torch.Tensor:
        return _tiles(self.data, first_row, rows)

    def _check(self, matrix: torch.Tensor) -> None:
        """Nothing: the values are looked at while they are packed, so that they are read from memory once."""

    def _pack(self, matrix: torch.Tensor, first_row: int) -> None:
        try:
            packing.pack_int4_rows_(self.data, matrix.contiguous(), first_row)
        except RuntimeError:
            super()._check(matrix)
            raise


class Int8Parameter(PackedParameter):
    """An int8 weight [output_size, input_size]."""

    @classmethod
    def zeros(cls, sizes: tuple[int, int], **kwargs: Any) -> Self:
        return cls(packing.zeros(packed_int8_shape(*sizes), torch.int8), sizes=sizes, **kwargs)

    def _rows(self, first_row: int, rows: int) -> torch.Tensor:
        return _tiles(self.data, first_row, rows)

    def _pack(self, matrix: torch.Tensor, first_row: int) -> None:
        packing.pack_int8_rows_(self.data, matrix.contiguous(), first_row)


def _tiles(packed: torch.Tensor, first_row: int, rows: int) -> torch.Tensor:
    """The tiles that hold a range of rows."""
    return packed[first_row // INT4_TILE_ROWS : -(-(first_row + rows) // INT4_TILE_ROWS)]
