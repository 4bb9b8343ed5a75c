# SPDX-License-Identifier: Apache-2.0
"""The method that vllm-ascend calls for the routed experts of a W4A4 layer.

Routing, shared experts and communication stay vllm-ascend's: its token dispatcher sorts the tokens by expert, in the
model's dtype, and brings the results back. (vllm-ascend's own int8 experts let the dispatcher quantize; int4 is not
among what its communication operators transport.) vllm_ascend is imported only when the experts compute or are made.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan
from vllm_w4a4_plugin.ops.npu.experts import Groups

from .experts_method import ExpertsMethod, RoutedExperts
from .schemes.experts_npu import NpuExpertsScheme

if TYPE_CHECKING:
    from .report import LoadReport


class AscendW4A4NpuExpertsMethod(ExpertsMethod):
    """The experts of vllm-ascend, whose layer is called `AscendFusedMoE` up to 0.23 and `AscendRoutedExperts` later.

    Args:
        moe, plan, report, expect_weights: of `ExpertsMethod`.
        tid2eid: vllm-ascend's table of the experts of each token id, for routers by hash; None for others.
    """

    scheme: NpuExpertsScheme

    def __init__(
        self, moe: FusedMoEConfig, plan: ExpertsPlan, report: "LoadReport", expect_weights: bool, tid2eid: Any = None
    ) -> None:
        super().__init__(moe, plan, NpuExpertsScheme(plan, report.packed), report, expect_weights)
        self.tid2eid = tid2eid

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def supports_eplb(self) -> bool:
        return False

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """None: vllm-ascend communicates by itself."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of the experts on this rank. Older vllm-ascend calls it twice for a layer.

        Raises:
            CheckpointError: the experts are not those of config.json, or nothing here runs them as they are divided.
        """
        self._check_features(layer)
        moe = self.moe
        sizes = (moe.num_logical_experts, hidden_size, intermediate_size_per_partition * moe.tp_size)
        self._check_model(sizes, moe.activation, {"the limit": moe.swiglu_limit or None})
        expert_map = layer.expert_map
        here = range(self.plan.count) if expert_map is None else expert_map.tolist()
        places = {expert: place for expert, place in enumerate(here) if place >= 0}
        ranks = (self.moe.tp_size, self.moe.tp_rank)
        self.scheme.create_weights(layer, places, params_dtype, ranks, self.moe.experts_per_token)
        self.report.expect(self.scheme)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
        **routing: Any,
    ) -> Any:
        """The weighted sum over the experts, as vllm-ascend's `FusedExpertsResult`.

        Args:
            layer: of vllm-ascend.
            x: [tokens, hidden], as vllm-ascend's communication prepared it.
            topk_weights, topk_ids: [tokens, top_k]; None where the method has to choose the experts (up to 0.23).
            shared_experts, shared_experts_input: not used: vllm-ascend computes them.
            routing: what else vllm-ascend up to 0.23 passes: the router's logits and how to choose by them.
        """
        from . import ascend_dispatch

        if topk_weights is None or topk_ids is None:
            topk_weights, topk_ids = ascend_dispatch.choose_experts(layer, x, self.tid2eid, **routing)
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        expert_map, mc2_mask = ascend_dispatch.placement(layer, routing)

        def compute(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
            y = self.scheme.apply(layer, rows, groups)
            # vllm-ascend multiplies the rows of experts of other ranks by zero, but not all of them were computed.
            return y if expert_map is None or not rows.shape[0] else groups.clear_rest(y)

        return ascend_dispatch.dispatched(x, topk_weights.to(x.dtype), topk_ids, expert_map, mc2_mask, compute)

    def _check_features(self, layer: RoutedExperts) -> None:
        from . import ascend_dispatch

        if feature := ascend_dispatch.unsupported_feature(layer):
            raise CheckpointError(
                f"layer {self.plan.prefix}: experts of type {self.plan.quant_type} do not run with {feature}. Turn it "
                "off, or quantize the experts as W8A8_DYNAMIC, which vllm-ascend runs."
            )
        ranks = self.moe.tp_size
        if ranks > 1 and ranks != get_tensor_model_parallel_world_size():
            raise CheckpointError(
                f"layer {self.plan.prefix}: each expert is split over {ranks} ranks, which are not the "
                f"{get_tensor_model_parallel_world_size()} of the tensor-parallel group, over which activations have "
                "to be gathered. Use --enable-expert-parallel."
            )
