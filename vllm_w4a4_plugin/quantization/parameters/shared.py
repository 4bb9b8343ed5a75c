# SPDX-License-Identifier: Apache-2.0
"""Parameters to which each shard of a fused layer brings a tensor of its own: transforms and clip ratios."""

from typing import Any

import torch
from vllm.model_executor.parameter import PerTensorScaleParameter

from vllm_w4a4_plugin.checkpoint.agreement import difference_from, merge_clip_ratios
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.spec import check_values

from .base import Completeness


class PerShardParameter(Completeness, PerTensorScaleParameter):
    """A parameter to which each shard of a fused layer brings a tensor of its own, none of them sharded by rank.

    Args:
        data: storage. plan, suffix: which tensors fill it. weight_loader: vLLM's.
    """

    def __init__(self, data: torch.Tensor, *, plan: LayerPlan, suffix: str, weight_loader: Any) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.plan, self.suffix = plan, suffix
        self.filled: frozenset[int] = frozenset()

    def missing(self) -> str:
        names = [f"{shard}.{self.suffix}" for index, shard in enumerate(self.plan.shards) if index not in self.filled]
        return f"no tensor filled {self.suffix} (expected {', '.join(names)})" if names else ""

    def mark_filled(self) -> None:
        self.filled = frozenset(range(len(self.plan.shards)))

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, 0)

    def load_replicated_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, 0)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(loaded_weight, 0)

    def load_rows(self, loaded_weight: torch.Tensor, first: int, total: int) -> None:
        """A tensor of a layer of which this rank has some rows; they all need this one."""
        self._load(loaded_weight, 0)

    def _load_into_shard_id(self, loaded_weight: torch.Tensor, shard_id: str | int, **kwargs: Any) -> None:
        self._load(loaded_weight, self._shard_id_as_int(shard_id))

    def _load(self, loaded: torch.Tensor, shard: int) -> None:
        if not self.is_meta and (problem := self._problem(loaded)):
            raise self.plan.error(self.suffix, shard, problem)
        if self.is_settled and not self.is_meta:
            self.filled, self.is_settled = frozenset(), False
        self._store(loaded, shard)
        if self.is_meta:
            return
        self.filled = self.filled | {shard}
        if not self.missing():
            self._complete()

    def _problem(self, loaded: torch.Tensor) -> str:
        expected = self._tensor_shape()
        if loaded.shape != expected and not loaded.numel() == expected.numel() == 1:
            return f"expected shape {list(expected)}, found {list(loaded.shape)}"
        return check_values(self.suffix, loaded, self.plan.quant_type)

    def _tensor_shape(self) -> torch.Size:
        raise NotImplementedError

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        raise NotImplementedError

    def _complete(self) -> None:
        """The tensors of all shards have arrived."""


class CommonParameter(PerShardParameter):
    """A float32 tensor, one for all shards: their copies must be equal to the bit."""

    def _tensor_shape(self) -> torch.Size:
        return self.shape

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        loaded = loaded.reshape(self.shape)
        others = sorted(self.filled - {shard})
        if self.is_meta:
            # Only one of the equal copies counts as loaded.
            if shard == 0:
                self.data.copy_(loaded)
        elif not others:
            self.data.copy_(loaded)
        elif not torch.equal(self.data, loaded.to(self.data)):
            problem = difference_from(self.plan.tensor_name(self.suffix, others[0]))
            raise self.plan.error(self.suffix, shard, problem)


class TransformParameter(CommonParameter):
    """A Kronecker factor [size, size]."""


class ClipRatioParameter(PerShardParameter):
    """Activation clip ratios, float32 [shards]: all shards get their common one, or are refused."""

    def _complete(self) -> None:
        clips = {self.plan.tensor_name(self.suffix, i): clip for i, clip in enumerate(self.data.tolist())}
        self.data.fill_(merge_clip_ratios(self.plan.prefix, clips, self.plan.files))

    def _tensor_shape(self) -> torch.Size:
        return torch.Size([1])

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        self.data[shard].copy_(loaded.reshape(()))
