# SPDX-License-Identifier: Apache-2.0
"""Parameters in the forms of the NPU operators, brought into them as each checkpoint tensor arrives."""

from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint.layer import WEIGHT
from vllm_w4a4_plugin.npu_limits import INT4_PER_WORD
from vllm_w4a4_plugin.ops import npu

from .parameters import LayerSource, RowsParameter, TransformParameter


class NpuPackedParameter(RowsParameter):
    """An int4 weight of rows x columns values as int32 [rows, columns / 8]."""

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        target = self.data.narrow(0, first_row, matrix.shape[0])
        if self.is_meta:
            target.copy_(target)
            return
        target.copy_(npu.pack_int4(matrix, self.device))
        self.source.on_packed()


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


def npu_packed_parameter(rows: int, columns: int, source: LayerSource, weight_loader: Any) -> NpuPackedParameter:
    """Storage for an int4 weight of rows x columns values."""
    return NpuPackedParameter(
        torch.zeros(rows, columns // INT4_PER_WORD, dtype=torch.int32),
        rows=rows,
        columns=columns,
        source=source,
        suffix=WEIGHT,
        weight_loader=weight_loader,
    )
