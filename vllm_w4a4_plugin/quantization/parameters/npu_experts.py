# SPDX-License-Identifier: Apache-2.0
"""Parameters of the experts of a layer in the forms of the NPU operators, filled expert by expert."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.ops.npu import cann, experts

from .experts import ExpertPart, ExpertsParameter, SharedTransformParameter


class NpuExpertsParameter(ExpertsParameter):
    """A matrix of each projection and expert, of which a tensor-parallel rank holds a part.

    Args:
        data: storage on this rank.
        part: what the parameter is for.
        sizes: (rows, columns) of one tensor on this rank.
        row_parts, input_parts: ranks over which the rows and the columns of a tensor are split.
    """

    def __init__(
        self,
        data: torch.Tensor,
        *,
        part: ExpertPart,
        sizes: tuple[int, int],
        row_parts: int = 1,
        input_parts: int = 1,
    ) -> None:
        super().__init__(data, part=part, sizes=sizes)
        self.row_parts, self.input_parts = row_parts, input_parts

    def load_expert(self, loaded: torch.Tensor, index: int) -> None:
        rows, rank = (index * self.rows, self.rows), self.tp_rank if self.row_parts > 1 else 0
        stored = (rank * rows[1], self.row_parts * rows[1])
        self._load(loaded, self.part.shards[index], rows, stored)

    def _place(self, first_row: int) -> tuple[int, int]:
        """(place of the expert, first of its rows) of a row of all."""
        return divmod(first_row, self.rows * len(self.part.projections))


class NpuZeroOffsetParameter(NpuExpertsParameter):
    """Weight offsets, which must be zero."""

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        if not self.is_meta and bool(matrix.any()):
            problem = "expected zeros, found other values: the kernels of experts on NPUs need symmetric weights"
            raise self.plan.error(self.suffix, self.part.shards[first_row // self.rows], problem)
        super()._store(matrix, first_row)


class NpuExpertWeightParameter(NpuExpertsParameter):
    """int4 weights, packed as each arrives.

    Args:
        is_grouped: stored for npu_grouped_matmul as int32 [experts, in, out / 8], else [experts, out, in / 8].
        on_packed: called after each tensor.
        kwargs: of `NpuExpertsParameter`.
    """

    def __init__(self, data: torch.Tensor, *, is_grouped: bool, on_packed: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        self.is_grouped, self.on_packed = is_grouped, on_packed

    def _is_float(self) -> bool:
        return False

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        place, row = self._place(first_row)
        if self.is_grouped:
            target = self.data[place].narrow(1, experts.words(row), experts.words(self.rows))
        else:
            target = self.data[place].narrow(0, row, self.rows)
        if self.is_meta:
            target.copy_(target)  # vLLM counts the elements that are copied
            return
        pack = experts.pack_grouped if self.is_grouped else cann.pack_int4
        target.copy_(pack(matrix, self.device))
        self.on_packed()


class NpuScaleWordsParameter(NpuExpertsParameter):
    """Weight scales as `ops.npu.experts.scale_words`: int64 [experts, out] or [experts, scale groups, out]."""

    def _is_float(self) -> bool:
        return True

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        place, row = self._place(first_row)
        target = self.data[place].narrow(-1, row, self.rows)
        target.copy_(target if self.is_meta else experts.scale_words(matrix.t().reshape(target.shape)))


class NpuSharedTransformParameter(SharedTransformParameter):
    """A factor that gate and up of all experts share, in the dtype of the activations.

    Args:
        transposed: store the transpose of the checkpoint's tensor, as npu_kronecker_quant takes L.
    """

    def __init__(self, data: torch.Tensor, *, part: ExpertPart, transposed: bool) -> None:
        super().__init__(data, part=part)
        self.transposed = transposed

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        super()._store(loaded.t() if self.transposed else loaded, shard)
