# SPDX-License-Identifier: Apache-2.0
"""Parameters in the forms of the NPU operators, brought into them as each checkpoint tensor arrives."""

from typing import Any, Self

import torch

from vllm_w4a4_plugin.ops.npu import cann
from vllm_w4a4_plugin.ops.npu.select import INT4_PER_WORD

from .base import PackedParameter
from .shared import TransformParameter


class NpuInt4Parameter(PackedParameter):
    """An int4 weight [output_size, input_size] as int32 [output_size, input_size / 8]."""

    @classmethod
    def zeros(cls, sizes: tuple[int, int], **kwargs: Any) -> Self:
        """Storage for a weight of `sizes`."""
        output_size, input_size = sizes
        return cls(torch.zeros(output_size, input_size // INT4_PER_WORD, dtype=torch.int32), sizes=sizes, **kwargs)

    def _rows(self, first_row: int, rows: int) -> torch.Tensor:
        return self.data.narrow(0, first_row, rows)

    def _pack(self, matrix: torch.Tensor, first_row: int) -> None:
        self._rows(first_row, matrix.shape[0]).copy_(cann.pack_int4(matrix, self.device))


class NpuTransformParameter(TransformParameter):
    """A Kronecker factor in the dtype of the activations; L is stored as L^T, as npu_kronecker_quant takes it.

    Args:
        transposed: store the transpose of the checkpoint's tensor.
    """

    def __init__(self, data: torch.Tensor, *, transposed: bool, **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        self.transposed = transposed

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        super()._store(loaded.t() if self.transposed else loaded, shard)
