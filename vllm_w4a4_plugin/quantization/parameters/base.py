# SPDX-License-Identifier: Apache-2.0
"""Parameters that are filled row range by row range."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Self

import torch
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.packed import unpack_rows
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.spec import check_values
from vllm_w4a4_plugin.checkpoint.types import WEIGHT_OFFSET

_QKV = {"q": 0, "k": 1, "v": 2}


def unpacked(loaded: torch.Tensor) -> torch.Tensor:
    """A checkpoint tensor with one value per element: int8 [output_size, input_size] of a packed weight (uint8)."""
    return unpack_rows(loaded) if loaded.dtype == torch.uint8 and loaded.dim() == 2 else loaded


def unpacking(weight_loader: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's weight loader for parameters that get unpacked tensors, so that vLLM divides rows as it knows them."""

    @wraps(weight_loader)
    def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return weight_loader(param, unpacked(loaded_weight), *args, **kwargs)

    return load


def shard_index(shard_id: str | int | None) -> int | None:
    """Position of a shard within its fused layer: q, k, v are 0, 1, 2."""
    return _QKV[shard_id] if isinstance(shard_id, str) else shard_id


class UnfitValuesError(ValueError):
    """Values that a parameter cannot take; the text says what is wrong with them."""


class Completeness:
    """Mixin of parameters that know which of their parts were loaded, load after load."""

    is_settled = False

    def settle(self) -> None:
        """A load has ended: what arrives from now on belongs to the next one, which must be complete by itself."""
        self.is_settled = True

    def missing(self) -> str:
        """What this load has not brought yet, "" if everything is there."""
        raise NotImplementedError

    def mark_filled(self) -> None:
        """Every value was written, not by a `load_*` method."""
        raise NotImplementedError


def require_filled(layer: torch.nn.Module, prefix: str) -> None:
    """Raise if a parameter of the layer was not filled, which vLLM does not check for quantized models.

    Args:
        layer: whose own parameters are asked.
        prefix: its name in vLLM.
    """
    for parameter in layer.parameters(recurse=False):
        if isinstance(parameter, Completeness) and (missing := parameter.missing()):
            raise CheckpointError(
                f"layer {prefix}: {missing}. The checkpoint is incomplete; copy or quantize it again."
            )


def settle(layer: torch.nn.Module) -> None:
    """A load of the layer has ended."""
    for parameter in layer.parameters(recurse=False):
        if isinstance(parameter, Completeness):
            parameter.settle()


class MatrixParameter(Completeness, BasevLLMParameter):
    """A matrix [output_size, input_size], or a vector [output_size], filled row range by row range.

    Args:
        data: storage on this rank.
        sizes: (output_size, input_size) on this rank; `data` may be laid out differently.
        input_parts: number of ranks over which the input features are split.
        plan, suffix: which tensors fill it.
        weight_loader: vLLM's, which calls the `load_*` methods.
    """

    output_dim = 0
    input_dim = 1

    def __init__(
        self,
        data: torch.Tensor,
        *,
        sizes: tuple[int, int],
        input_parts: int,
        plan: LayerPlan,
        suffix: str,
        weight_loader: Any,
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.output_size, self.input_size = sizes
        self.input_parts = input_parts
        self.plan, self.suffix = plan, suffix
        # Replaced, never changed in place: vLLM's reload keeps a shallow copy of the attributes from before loading.
        self.filled: Mapping[int, int] = {}

    def missing(self) -> str:
        have = sum(self.filled.values())
        if have >= self.output_size:
            return ""
        names = ", ".join(f"{shard}.{self.suffix}" for shard in self.plan.shards)
        return f"{have} of {self.output_size} rows of {self.suffix} were loaded (from {names})"

    def mark_filled(self) -> None:
        self.filled = {0: self.output_size}

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self.load_rows(loaded_weight, self.tp_rank * self.output_size, self.tp_size * self.output_size)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self.load_replicated_weight(loaded_weight)

    def load_replicated_weight(self, loaded_weight: torch.Tensor) -> None:
        """A tensor of which every rank has all rows."""
        self.load_rows(loaded_weight, 0, self.output_size)

    def load_rows(self, loaded_weight: torch.Tensor, first: int, total: int) -> None:
        """A tensor of `total` rows, of which those from `first` on are this parameter's."""
        self._load(loaded_weight, None, (0, self.output_size), (first, total))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        rows = (kwargs["shard_offset"], kwargs["shard_size"])
        stored = (self.tp_rank * rows[1], self.tp_size * rows[1])
        self._load(loaded_weight, shard_index(kwargs["shard_id"]), rows, stored)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        # num_heads is the number of ranks that hold a copy of the same key-value head.
        copies = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        rows = (kwargs["shard_offset"], kwargs["shard_size"])
        stored = (self.tp_rank // copies * rows[1], self.tp_size // copies * rows[1])
        self._load(loaded_weight, shard_index(kwargs["shard_id"]), rows, stored)

    def _load(self, loaded: torch.Tensor, shard: int | None, rows: tuple[int, int], stored: tuple[int, int]) -> None:
        """Take this rank's rows of a checkpoint tensor.

        Args:
            loaded: the whole tensor.
            shard: of the fused layer that it belongs to.
            rows: first row here, and how many.
            stored: first of these rows in the tensor, and how many rows it has.
        """
        (first_row, count), (first_stored, total) = rows, stored
        matrix = self._matrix(loaded, shard)
        expected = (total, self.input_size * self.input_parts)
        matrix = self._unpacked(matrix, expected[0])
        if matrix.shape != expected:
            ranks = f" for {self.tp_size} tensor-parallel ranks" if self.tp_size > 1 else ""
            problem = f"expected shape {list(expected)}{ranks}, found {list(loaded.shape)}"
            raise self.plan.error(self.suffix, shard, problem)
        matrix = matrix.narrow(0, first_stored, count)
        if self.input_parts > 1:
            matrix = matrix.narrow(1, self.tp_rank * self.input_size, self.input_size)
        try:
            if not self.is_meta:
                self._check(matrix)
            self._store(matrix, first_row)
        except UnfitValuesError as error:
            raise self.plan.error(self.suffix, shard, str(error)) from None
        if not self.is_meta:
            self.filled = {**({} if self.is_settled else self.filled), first_row: count}
            self.is_settled = False

    def _check(self, matrix: torch.Tensor) -> None:
        """Raise `UnfitValuesError` if the values are not those that the type allows."""
        if problem := check_values(self.suffix, matrix, self.plan.quant_type):
            raise UnfitValuesError(problem)

    def _matrix(self, loaded: torch.Tensor, shard: int | None) -> torch.Tensor:
        """The tensor in two dimensions and with a dtype of the parameter's kind."""
        if self._is_float() and not loaded.dtype.is_floating_point and self.suffix == WEIGHT_OFFSET:
            loaded = loaded.float()
        if loaded.dtype.is_floating_point != self._is_float():
            expected = "a float dtype" if self._is_float() else "int8"
            raise self.plan.error(self.suffix, shard, f"expected {expected}, found {loaded.dtype}")
        if loaded.dim() == 3 and loaded.shape[2] == 1:
            loaded = loaded.squeeze(2)
        return loaded.reshape(-1, 1) if loaded.dim() < 2 else loaded

    def _unpacked(self, matrix: torch.Tensor, rows: int) -> torch.Tensor:
        """The matrix with one value per element, `rows` being how many rows it should have."""
        return matrix

    def _is_float(self) -> bool:
        return self.dtype.is_floating_point

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        target = self.data.narrow(0, first_row, matrix.shape[0])
        target.copy_(matrix.reshape(target.shape))


class DeqScaleParameter(MatrixParameter):
    """float32 scales that may be stored as int64, in whose low half are the bits of the float32 value."""

    def _matrix(self, loaded: torch.Tensor, shard: int | None) -> torch.Tensor:
        if not loaded.dtype.is_floating_point:
            loaded = loaded.to(torch.int32).view(torch.float32)
        return super()._matrix(loaded, shard)


class ZeroOffsetParameter(MatrixParameter):
    """Weight offsets of a layer whose kernel needs symmetric weights: they must be zero."""

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        if not self.is_meta and bool(matrix.any()):
            problem = "expected zeros, found other values: the kernels of this layer need symmetric weights"
            raise self.plan.error(self.suffix, None, problem)
        super()._store(matrix, first_row)


class PackedParameter(MatrixParameter):
    """A weight that is packed as each checkpoint tensor arrives.

    Args:
        on_packed: called after each tensor.
    """

    def __init__(self, data: torch.Tensor, *, on_packed: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        self.on_packed = on_packed

    @classmethod
    def zeros(cls, sizes: tuple[int, int], **kwargs: Any) -> Self:
        """Storage for a weight of `sizes`, (output_size, input_size) on this rank."""
        raise NotImplementedError

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
