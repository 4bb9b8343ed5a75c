# SPDX-License-Identifier: Apache-2.0
"""Parameters of the experts of a layer: each holds one tensor of every expert on this rank, filled expert by expert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan
from vllm_w4a4_plugin.ops.layout import INT4_TILE_ROWS

from .base import MatrixParameter, unpacked
from .shared import ClipRatioParameter, TransformParameter

PROJECTIONS = {"w1": 0, "w3": 1, "w2": 2}
"""vLLM's names of gate, up and down -> their place among the three of an expert in `ExpertsPlan.shards`."""


@dataclass(frozen=True)
class ExpertPart:
    """What a parameter is for: one tensor of some projections of the experts on this rank.

    Attributes:
        plan: of the layer.
        suffix: of the tensor.
        projections: (0, 1) for gate and up, (2,) for down.
        places: number of each expert on this rank -> its place here.
    """

    plan: ExpertsPlan
    suffix: str
    projections: tuple[int, ...]
    places: Mapping[int, int]

    @property
    def shards(self) -> list[int]:
        """Indices into the plan's shards, in the order of the rows here."""
        experts = sorted(self.places, key=self.places.__getitem__)
        return [3 * expert + projection for expert in experts for projection in self.projections]

    def index(self, expert: int, shard_id: str) -> int:
        """Place of a tensor in `shards`."""
        projection = self.projections.index(PROJECTIONS[shard_id])
        return self.places[expert] * len(self.projections) + projection


def load_expert(
    param: Any,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The `weight_loader` of all parameters here; vLLM calls it with these keywords.

    Returns:
        Whether the expert is on this rank, if `return_success`.
    """
    is_here = expert_id in param.part.places
    if is_here:
        param.load_expert(unpacked(loaded_weight), param.part.index(expert_id, shard_id))
    return is_here if return_success else None


class ExpertsParameter(MatrixParameter):
    """A matrix of each projection and expert, stored as [experts, rows of all projections, ...].

    Args:
        data: storage.
        part: what the parameter is for.
        sizes: (rows, columns) of one tensor.
    """

    def __init__(
        self,
        data: torch.Tensor,
        *,
        part: ExpertPart,
        sizes: tuple[int, int],
    ) -> None:
        rows, columns = sizes
        super().__init__(
            data,
            sizes=(rows * len(part.shards), columns),
            input_parts=1,
            plan=part.plan,
            suffix=part.suffix,
            weight_loader=load_expert,
        )
        self.part, self.rows = part, rows

    def load_expert(self, loaded: torch.Tensor, index: int) -> None:
        """Take tensor `index` of the part's shards."""
        self._load(loaded, self.part.shards[index], (index * self.rows, self.rows), (0, self.rows))

    def mark_filled(self) -> None:
        self.filled = {index * self.rows: self.rows for index in range(len(self.part.shards))}

    def missing(self) -> str:
        shards = self.part.shards
        lacking = [shard for index, shard in enumerate(shards) if index * self.rows not in self.filled]
        if not lacking:
            return ""
        return f"no tensor {self.plan.tensor_name(self.suffix, lacking[0])} ({len(lacking)} of {len(shards)} missing)"

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        target = self.data.flatten(0, 1).narrow(0, first_row, matrix.shape[0])
        target.copy_(matrix.reshape(target.shape))


class PackedExpertsParameter(ExpertsParameter):
    """The weights of the experts, packed as each arrives: [experts, tiles, blocks, bytes of a block].

    Args:
        pack_rows: `packing.pack_int4_rows_` or `packing.pack_int8_rows_`.
        on_packed: called after each tensor.
        kwargs: of `ExpertsParameter`.
    """

    def __init__(
        self,
        data: torch.Tensor,
        *,
        pack_rows: Callable[[torch.Tensor, torch.Tensor, int], None],
        on_packed: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.pack_rows, self.on_packed = pack_rows, on_packed

    def _store(self, matrix: torch.Tensor, first_row: int) -> None:
        place, row = divmod(first_row, self.rows * len(self.part.projections))
        packed = self.data[place]
        if self.is_meta:
            # vLLM counts the elements that are copied: each tile once, also one that two projections share.
            tiles = packed[-(-row // INT4_TILE_ROWS) : -(-(row + self.rows) // INT4_TILE_ROWS)]
            tiles.copy_(tiles)
            return
        self.pack_rows(packed, matrix.contiguous(), row)
        self.on_packed()


class SharedTransformParameter(TransformParameter):
    """A Kronecker factor that gate and up of all experts share; each brings a copy, equal to the bit."""

    def __init__(self, data: torch.Tensor, *, part: ExpertPart) -> None:
        super().__init__(data, plan=_plan_of(part), suffix=part.suffix, weight_loader=load_expert)
        self.part = part

    def load_expert(self, loaded: torch.Tensor, index: int) -> None:
        """Take tensor `index` of the part's shards."""
        self._load(loaded, index)

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        if not self.is_meta:
            return super()._store(loaded, shard)
        # vLLM counts the elements that are copied; each copy counts for its part of them, so that none is too many.
        copies, size = len(self.plan.shards), self.numel()
        counted = self.data.flatten()[shard * size // copies : (shard + 1) * size // copies]
        counted.copy_(counted)


class SharedClipRatioParameter(ClipRatioParameter):
    """The clip ratios of gate and up of all experts, float32 [projections of all]: all get their common one."""

    def __init__(self, data: torch.Tensor, *, part: ExpertPart) -> None:
        super().__init__(data, plan=_plan_of(part), suffix=part.suffix, weight_loader=load_expert)
        self.part = part

    def load_expert(self, loaded: torch.Tensor, index: int) -> None:
        """Take tensor `index` of the part's shards."""
        self._load(loaded, index)


def _plan_of(part: ExpertPart) -> ExpertsPlan:
    """The layer's plan with the shards that fill one parameter only."""
    return replace(part.plan, shards=tuple(part.plan.shards[shard] for shard in part.shards))
