# SPDX-License-Identifier: Apache-2.0
"""Parameters that are filled row range by row range."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.spec import check_values

_QKV = {"q": 0, "k": 1, "v": 2}


def shard_index(shard_id: str | int | None) -> int | None:
    """Position of a shard within its fused layer: q, k, v are 0, 1, 2."""
    return _QKV[shard_id] if isinstance(shard_id, str) else shard_id


class MatrixParameter(BasevLLMParameter):
    """A matrix [output_size, input_size], or a vector [output_size], filled row range by row range.

    Args:
        data: storage on this rank.
        sizes: (output_size, input_size) on this rank; `data` may be laid out differently.
        plan, suffix: which tensors fill it.
        weight_loader: vLLM's, which calls the `load_*` methods.
    """

    output_dim = 0
    input_dim = 1

    def __init__(
        self, data: torch.Tensor, *, sizes: tuple[int, int], plan: LayerPlan, suffix: str, weight_loader: Any
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.output_size, self.input_size = sizes
        self.plan, self.suffix = plan, suffix
        # Replaced, never changed in place: vLLM's reload keeps a shallow copy of the attributes from before loading.
        self.filled: Mapping[int, int] = {}

    def missing(self) -> str:
        """What has not been loaded yet, "" if everything has."""
        have = sum(self.filled.values())
        if have >= self.output_size:
            return ""
        names = ", ".join(f"{shard}.{self.suffix}" for shard in self.plan.shards)
        return f"{have} of {self.output_size} rows of {self.suffix} were loaded (from {names})"

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, None, 0, self.output_size, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, None, 0, self.output_size, 0)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        shard = shard_index(kwargs["shard_id"])
        self._load(loaded_weight, shard, kwargs["shard_offset"], kwargs["shard_size"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        # num_heads is the number of ranks that hold a copy of the same key-value head.
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        shard = shard_index(kwargs["shard_id"])
        self._load(loaded_weight, shard, kwargs["shard_offset"], kwargs["shard_size"], rank)

    def _load(self, loaded: torch.Tensor, shard: int | None, first_row: int, rows: int, rank: int) -> None:
        if loaded.dtype.is_floating_point != self._is_float():
            expected = "a float dtype" if self._is_float() else "int8"
            raise self.plan.error(self.suffix, shard, f"expected {expected}, found {loaded.dtype}")
        matrix = loaded.reshape(-1, 1) if loaded.dim() < 2 else loaded
        matrix = self._partition(matrix, 0, rows, rank, shard, loaded.shape)
        matrix = self._partition(matrix, 1, self.input_size, self.tp_rank, shard, loaded.shape)
        if not self.is_meta and (problem := check_values(self.suffix, matrix, self.plan.quant_type)):
            raise self.plan.error(self.suffix, shard, problem)
        self._store(matrix, first_row)
        if not self.is_meta:
            self.filled = {**self.filled, first_row: rows}

    def _partition(
        self, matrix: torch.Tensor, dim: int, size: int, rank: int, shard: int | None, shape: torch.Size
    ) -> torch.Tensor:
        """This rank's part of `matrix` along `dim`; a tensor of the local size is every rank's."""
        if matrix.shape[dim] == size:
            return matrix
        if matrix.shape[dim] % size or (rank + 1) * size > matrix.shape[dim]:
            what = f"{size} {'rows' if dim == 0 else 'columns'} for each of {self.tp_size} tensor-parallel ranks"
            raise self.plan.error(self.suffix, shard, f"expected {what}, found shape {list(shape)}")
        return matrix.narrow(dim, rank * size, size)

    def _is_float(self) -> bool:
        return self.dtype.is_floating_point

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        target = self.data.narrow(0, first_row, matrix.shape[0])
        target.copy_(matrix.reshape(target.shape))


class PackedParameter(MatrixParameter):
    """A weight that is packed as each checkpoint tensor arrives.

    Args:
        on_packed: called after each tensor.
    """

    def __init__(self, data: torch.Tensor, *, on_packed: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        self.on_packed = on_packed

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        if self.is_meta:
            target = self._rows(first_row, matrix.shape[0])
            target.copy_(target)
            return
        self._pack(matrix, first_row)
        self.on_packed()

    def _rows(self, first_row: int, rows: int) -> torch.Tensor:
        """The storage of a range of rows."""
        raise NotImplementedError

    def _pack(self, matrix: torch.Tensor, first_row: int) -> None:
        """Write the rows of `matrix`, int8, over those from `first_row` on."""
        raise NotImplementedError
