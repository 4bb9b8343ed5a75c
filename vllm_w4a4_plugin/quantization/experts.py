# SPDX-License-Identifier: Apache-2.0
"""The method that vLLM calls for the routed experts of a layer. Routing and shared experts stay vLLM's."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan

from .experts_method import ExpertsMethod, RoutedExperts
from .schemes.experts import ExpertsScheme

if TYPE_CHECKING:
    from .report import LoadReport


class AscendW4A4ExpertsMethod(ExpertsMethod):
    """The experts of vLLM on CPUs.

    Every rank holds whole experts, also where vLLM would split each of them (tensor parallelism without
    `--enable-expert-parallel`): the scale of a down projection's input, and its transform, need all intermediate
    features of a token. What the ranks compute adds up either way. The ranks add it up themselves, before it is rounded
    to the model's dtype, so that the sums are those of one rank; vLLM then adds zeros.
    """

    scheme: ExpertsScheme

    def __init__(self, moe: FusedMoEConfig, plan: ExpertsPlan, report: "LoadReport", expect_weights: bool) -> None:
        super().__init__(moe, plan, ExpertsScheme(plan, report.packed), report, expect_weights)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of the experts on this rank.

        Raises:
            CheckpointError: the experts are not those of config.json, or nothing here runs them as vLLM divides them.
        """
        moe = self.moe
        limits = {"the limit": layer.swiglu_limit, "alpha": layer.swiglu_alpha, "beta": layer.swiglu_beta}
        self._check_model((moe.num_experts, moe.hidden_dim, moe.intermediate_size), layer.activation, limits)
        self.expert_map = self._whole_experts() if layer.expert_map is None else layer.expert_map
        here = range(self.plan.count) if self.expert_map is None else self.expert_map.tolist()
        places = {expert: place for expert, place in enumerate(here) if place >= 0}
        # vLLM itself adds up what ranks give whose tokens come from several engines.
        ranks = get_tensor_model_parallel_world_size()
        self.scheme.has_part_of_sum = ranks > 1 and ranks == self.moe.tp_size * self.moe.ep_size
        self.scheme.create_weights(layer, places, params_dtype)
        self.report.expect(self.scheme)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        y = self.scheme.apply(layer, x, topk_weights, topk_ids, self.expert_map)
        return sum_over_ranks(y, x.dtype) if self.scheme.has_part_of_sum else y

    def _whole_experts(self) -> torch.Tensor | None:
        """int32 [experts]: the place of each on this rank or -1, for ranks among which vLLM would split experts.

        None if there is one rank. The numbers of experts on the ranks differ by at most one.
        """
        count, ranks, rank = self.plan.count, self.moe.tp_size, self.moe.tp_rank
        if ranks == 1:
            return None
        first, end = count * rank // ranks, count * (rank + 1) // ranks
        places = torch.full((count,), -1, dtype=torch.int32, device="cpu")
        places[first:end] = torch.arange(end - first, dtype=torch.int32, device="cpu")
        return places


def sum_over_ranks(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the ranks' parts rounded to `dtype` on the first rank, zeros on the others, over which vLLM adds.

    Args:
        part: float64 [tokens, hidden].
        dtype: of the result.
    """
    # vLLM's exchange through shared memory knows no float64; it copies halves of them bit by bit.
    gathered = tensor_model_parallel_all_gather(part.view(torch.float32))
    parts = gathered.unflatten(-1, (-1, 2 * part.shape[-1])).contiguous().view(torch.float64)
    total = parts.sum(-2).float().to(dtype)
    return total if get_tensor_model_parallel_rank() == 0 else torch.zeros_like(total)
