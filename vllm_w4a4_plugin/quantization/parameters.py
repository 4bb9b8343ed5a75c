# SPDX-License-Identifier: Apache-2.0
"""vLLM parameters that check what is loaded into them, know what is still missing, and pack int4 on arrival.

vLLM's linear layers call one of four `load_*` methods per checkpoint tensor (weight loader v2). Each parameter here
turns such a call into "these rows of mine come from that part of the tensor", checks dtype, shape and values, and
notes the rows as filled. Nothing is replaced after loading, so every parameter can be loaded again.

vLLM's reload loads everything twice: first into parameters on the meta device, to count the elements that `copy_`
will write, then, when a layer is complete, into real ones that inherit the attributes of the former.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.parameter import BasevLLMParameter, PerTensorScaleParameter

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantType
from vllm_w4a4_plugin.checkpoint.layer import WEIGHT, check_values, common_clip

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class LayerSource:
    """Where the parameters of one vLLM layer come from; for checks and error messages.

    Attributes:
        prefix: the vLLM layer.
        quant_type: its type.
        shards: checkpoint names of the modules fused into it, in order.
        files: checkpoint tensor name -> shard file, empty if not known.
        on_packed: called after each weight tensor that was packed.
    """

    prefix: str
    quant_type: QuantType
    shards: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    on_packed: Callable[[], None] = lambda: None

    def tensor_name(self, suffix: str, shard: int | None) -> str:
        """Name of the checkpoint tensor that fills part `shard` of a parameter (None: the only part)."""
        return f"{self.shards[shard if shard is not None and shard < len(self.shards) else 0]}.{suffix}"

    def error(self, suffix: str, shard: int | None, problem: str) -> CheckpointError:
        """The exception for a bad tensor of this layer."""
        name = self.tensor_name(suffix, shard)
        file = f"{self.files[name]}: " if name in self.files else ""
        return CheckpointError(
            f"{file}layer {self.prefix}, tensor {name}: {problem}. "
            "The checkpoint is damaged or does not fit config.json; copy or quantize it again."
        )


def shard_index(shard_id: str | int | None) -> int | None:
    """Position of a shard within its fused layer: q, k, v are 0, 1, 2."""
    return _QKV[shard_id] if isinstance(shard_id, str) else shard_id


class RowsParameter(BasevLLMParameter):
    """A [rows, columns] matrix, or a [rows] vector, filled row range by row range.

    Args:
        data: storage on this rank.
        rows, columns: logical size on this rank (`data` may be laid out differently).
        source, suffix: which tensors fill it.
        weight_loader: vLLM's, which calls the `load_*` methods.
    """

    def __init__(
        self,
        data: torch.Tensor,
        *,
        rows: int,
        columns: int,
        source: LayerSource,
        suffix: str,
        weight_loader: Callable[..., Any],
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.rows, self.columns = rows, columns
        self.source, self.suffix = source, suffix
        # Replaced, never changed in place: vLLM's reload keeps a shallow copy of the attributes from before loading.
        self.filled: Mapping[int, int] = {}

    output_dim = 0
    input_dim = 1

    def missing(self) -> str | None:
        """What has not been loaded yet, None if everything has."""
        have = sum(self.filled.values())
        if have >= self.rows:
            return None
        names = ", ".join(f"{shard}.{self.suffix}" for shard in self.source.shards)
        return f"{have} of {self.rows} rows of {self.suffix} were loaded (from {names})"

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, None, 0, self.rows, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, None, 0, self.rows, 0)

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
            raise self.source.error(self.suffix, shard, f"expected {expected}, found {loaded.dtype}")
        matrix = loaded.reshape(-1, 1) if loaded.dim() < 2 else loaded
        matrix = self._take(matrix, 0, rows, rank, shard, loaded.shape)
        matrix = self._take(matrix, 1, self.columns, self.tp_rank, shard, loaded.shape)
        if not self.is_meta and (problem := check_values(self.suffix, matrix, self.source.quant_type)):
            raise self.source.error(self.suffix, shard, problem)
        self._store(matrix, first_row)
        if not self.is_meta:
            self.filled = {**self.filled, first_row: rows}

    def _take(
        self, matrix: torch.Tensor, dim: int, size: int, rank: int, shard: int | None, shape: torch.Size
    ) -> torch.Tensor:
        """This rank's part of `matrix` along `dim`; a tensor of the local size is every rank's."""
        if matrix.shape[dim] == size:
            return matrix
        if matrix.shape[dim] % size or (rank + 1) * size > matrix.shape[dim]:
            what = f"{size} {'rows' if dim == 0 else 'columns'} for each of {self.tp_size} tensor-parallel ranks"
            raise self.source.error(self.suffix, shard, f"expected {what}, found shape {list(shape)}")
        return matrix.narrow(dim, rank * size, size)

    def _is_float(self) -> bool:
        return self.dtype.is_floating_point

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        target = self.data.narrow(0, first_row, matrix.shape[0])
        target.copy_(matrix.reshape(target.shape))


class PackedParameter(RowsParameter):
    """A weight [rows, columns] in the CPU kernels' layout, packed as each checkpoint tensor arrives.

    Declared int8, the dtype of the checkpoint's tensors, so that vLLM sees no dtype change on loading.

    Args:
        pack_rows: the operator that writes rows of an int8 matrix into the packed form.
    """

    def __init__(
        self,
        data: torch.Tensor,
        *,
        pack_rows: Callable[[torch.Tensor, torch.Tensor, int], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.pack_rows = pack_rows

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        if self.is_meta:
            tiles = self.data[first_row // ops.INT4_TILE_ROWS : -(-(first_row + matrix.shape[0]) // ops.INT4_TILE_ROWS)]
            tiles.copy_(tiles)
            return
        self.pack_rows(self.data, matrix.contiguous(), first_row)
        self.source.on_packed()


def packed_int4_parameter(rows: int, columns: int, source: LayerSource, weight_loader: Any) -> PackedParameter:
    """An int4 weight of rows x columns values, two per byte."""
    return _packed_parameter(ops.packed_int4_shape, ops.pack_int4_rows_, rows, columns, source, weight_loader)


def packed_int8_parameter(rows: int, columns: int, source: LayerSource, weight_loader: Any) -> PackedParameter:
    """An int8 weight of rows x columns values."""
    return _packed_parameter(ops.packed_int8_shape, ops.pack_int8_rows_, rows, columns, source, weight_loader)


def _packed_parameter(
    packed_shape: Callable[[int, int], tuple[int, ...]],
    pack_rows: Callable[[torch.Tensor, torch.Tensor, int], None],
    rows: int,
    columns: int,
    source: LayerSource,
    weight_loader: Any,
) -> PackedParameter:
    return PackedParameter(
        torch.zeros(packed_shape(rows, columns), dtype=torch.int8),
        pack_rows=pack_rows,
        rows=rows,
        columns=columns,
        source=source,
        suffix=WEIGHT,
        weight_loader=weight_loader,
    )


class PerShardParameter(PerTensorScaleParameter):
    """A parameter to which each shard of a fused layer brings a tensor of its own, none of them sharded by rank."""

    def __init__(
        self, data: torch.Tensor, *, source: LayerSource, suffix: str, weight_loader: Callable[..., Any]
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.source, self.suffix = source, suffix
        self.filled: frozenset[int] = frozenset()

    def missing(self) -> str | None:
        """What has not been loaded yet, None if everything has."""
        names = [f"{shard}.{self.suffix}" for index, shard in enumerate(self.source.shards) if index not in self.filled]
        return f"no tensor filled {self.suffix} (expected {', '.join(names)})" if names else None

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, 0)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, 0)

    def _load_into_shard_id(self, loaded_weight: torch.Tensor, shard_id: str | int, **kwargs: Any) -> None:
        self._load(loaded_weight, self._shard_id_as_int(shard_id))

    def _load(self, loaded: torch.Tensor, shard: int) -> None:
        if not self.is_meta and (problem := self._problem(loaded)):
            raise self.source.error(self.suffix, shard, problem)
        self._store(loaded, shard)
        if not self.is_meta:
            self.filled = self.filled | {shard}

    def _problem(self, loaded: torch.Tensor) -> str | None:
        expected = self._tensor_shape()
        if loaded.shape != expected and not loaded.numel() == expected.numel() == 1:
            return f"expected shape {list(expected)}, found {list(loaded.shape)}"
        return check_values(self.suffix, loaded, self.source.quant_type)

    def _tensor_shape(self) -> torch.Size:
        raise NotImplementedError

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        raise NotImplementedError


class TransformParameter(PerShardParameter):
    """A Kronecker factor, float32 [size, size], one for all shards: their copies must be equal to the bit."""

    def _tensor_shape(self) -> torch.Size:
        return self.shape

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        others = sorted(self.filled - {shard})
        if self.is_meta:
            # Only one of the equal copies counts as loaded.
            if shard == 0:
                self.data.copy_(loaded)
        elif not others:
            self.data.copy_(loaded)
        elif not torch.equal(self.data, loaded.to(self.data)):
            names = ", ".join(self.source.tensor_name(self.suffix, other) for other in others)
            problem = f"expected the same values as in {names} (vLLM computes them as one matrix product), found others"
            raise self.source.error(self.suffix, shard, problem)


class ClipRatioParameter(PerShardParameter):
    """Activation clip ratios, float32 [shards]; `settle` makes them one."""

    def settle(self) -> None:
        """Give all shards their common clip ratio.

        Raises:
            CheckpointError: the shards differ by more than rounding.
        """
        clips = {self.source.tensor_name(self.suffix, i): clip for i, clip in enumerate(self.data.tolist())}
        try:
            self.data.fill_(common_clip(clips))
        except CheckpointError as error:
            raise CheckpointError(f"layer {self.source.prefix}: {error}") from None

    def _tensor_shape(self) -> torch.Size:
        return torch.Size([1])

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        self.data[shard].copy_(loaded.reshape(()))
