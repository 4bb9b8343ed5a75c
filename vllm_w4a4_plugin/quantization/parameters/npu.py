# SPDX-License-Identifier: Apache-2.0
"""Parameters in the forms of the NPU operators, brought into them as each checkpoint tensor arrives."""

from typing import Any, Self

import torch

from vllm_w4a4_plugin.ops.npu import cann, fused
from vllm_w4a4_plugin.ops.npu.select import INT4_PER_WORD

from .base import PackedParameter
from .shared import TransformParameter


class NpuInt4Parameter(PackedParameter):
    """An int4 weight [output_size, input_size], loaded as int32 [output_size, input_size / 8]."""

    @classmethod
    def zeros(cls, sizes: tuple[int, int], *, is_fused: bool = False, **kwargs: Any) -> Self:
        """Storage for a weight of `sizes`, in the shape of the fused kernel's or of CANN's form."""
        output_size, input_size = sizes
        shape = fused.fractals_shape(*sizes) if is_fused else (output_size, input_size // INT4_PER_WORD)
        return cls(torch.zeros(shape, dtype=torch.int32), sizes=sizes, **kwargs)

    def as_rows(self) -> torch.Tensor:
        """The memory as int32 [output_size, input_size / 8]."""
        return self.data.view(self.output_size, self.input_size // INT4_PER_WORD)

    def _rows(self, first_row: int, rows: int) -> torch.Tensor:
        return self.as_rows().narrow(0, first_row, rows)

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
