# SPDX-License-Identifier: Apache-2.0
"""What the experts need of vllm-ascend, under the names of 0.23 and of its 0.30 line. Imports it in functions only."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_w4a4_plugin.ops.npu.experts import Groups

Experts = Callable[[torch.Tensor, Groups], torch.Tensor]
"""(rows [rows, hidden] sorted by expert, which expert has which) -> results [rows, hidden]."""


def unsupported_feature(layer: Any) -> str:
    """Name of a feature that is turned on and that W4A4 experts do not run with, "" if there is none."""
    from vllm.config import get_current_vllm_config
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    eplb = config.eplb_config
    features = {
        "load balancing of experts (eplb_config)": eplb.dynamic_eplb
        or eplb.expert_map_path
        or eplb.num_redundant_experts
        or get_current_vllm_config().parallel_config.enable_eplb,
        "fused MC2 communication (enable_fused_mc2), whose operators multiply int8": config.enable_fused_mc2,
        "the gate on a stream of its own (multistream_overlap_gate)": getattr(
            config, "multistream_overlap_gate", False
        ),
        "shared experts among the routed ones (mix_placement)": getattr(config, "mix_placement", False),
        "experts that compute nothing (zero_expert_num)": getattr(layer, "zero_expert_num", 0),
        "LoRA adapters": get_current_vllm_config().lora_config is not None,
    }
    return next((name for name, is_on in features.items() if is_on), "")


def choose_experts(
    layer: Any,
    x: torch.Tensor,
    tid2eid: Any,
    *,
    router_logits: torch.Tensor,
    num_experts: int,
    enable_force_load_balance: bool = False,
    **routing: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of each token's experts, [tokens, top_k], by vllm-ascend 0.23's own selection."""
    from vllm_ascend.ops.fused_moe.experts_selector import select_experts

    names = (
        "top_k", "use_grouped_topk", "renormalize", "topk_group", "num_expert_group", "custom_routing_function",
        "scoring_func", "routed_scaling_factor", "e_score_correction_bias",
    )  # fmt: skip
    weights, ids = select_experts(
        hidden_states=x,
        router_logits=router_logits,
        num_experts=num_experts,
        tid2eid=tid2eid,
        **{name: routing[name] for name in names},
    )
    if enable_force_load_balance:  # while vLLM measures memory
        ids = torch.rand(ids.shape[0], num_experts, device=ids.device).argsort(1)[:, : ids.shape[1]].to(ids.dtype)
    return weights, ids


def placement(layer: Any, routing: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(place on this rank of each expert or -1, None if all are here; which tokens MC2 takes to be no padding).

    Args:
        layer: has both in the 0.30 line.
        routing: what 0.23 passes to the method instead.
    """
    if routing:
        return routing["expert_map"], routing["mc2_mask"]
    return layer.ascend_expert_map, layer.ascend_mc2_mask


def communication() -> Any:
    """vllm-ascend's way to exchange the tokens of this step: all-gather, all-to-all or MC2."""
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX

    return _EXTRA_CTX.moe_comm_method


def dispatched(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    mc2_mask: torch.Tensor | None,
    compute: Experts,
) -> Any:
    """Sort the tokens by expert, over ranks too, compute, and bring the results back as `FusedExpertsResult`.

    This is vllm-ascend's `MoECommMethod.fused_experts` with another computation in the middle.
    """
    from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult

    dispatcher = communication().token_dispatcher
    before_dispatch = _event()
    sent = dispatcher.token_dispatch(
        token_dispatch_input=_dispatch_input(x, topk_weights, topk_ids, expert_map, mc2_mask)
    )
    rows = sent.hidden_states
    groups = Groups.of(sent.group_list, sent.group_list_type, rows.shape[0])
    before_experts = _event()
    y = compute(rows, groups)
    before_combine = _event()
    combined = dispatcher.token_combine(hidden_states=y, combine_metadata=sent.combine_metadata)
    return FusedExpertsResult(
        routed_out=combined,
        before_dispatch_evt=before_dispatch,
        before_gmm2_evt=before_experts,
        before_combine_evt=before_combine,
        group_list_type=sent.group_list_type,
        expert_tokens=sent.group_list,
    )


def _dispatch_input(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    mc2_mask: torch.Tensor | None,
) -> Any:
    try:
        from vllm_ascend.ops.fused_moe.dataclass import moe_quant, router_input, token_dispatcher

        kinds = token_dispatcher.MoETokenDispatchInput, router_input.MoeRouterInput, moe_quant.MoEQuantParams
    except ImportError:
        from vllm_ascend.ops.fused_moe import moe_runtime_args as args

        kinds = args.MoETokenDispatchInput, args.MoERoutingParams, args.MoEQuantParams
    dispatch_input, routing, quant = kinds
    return dispatch_input(
        hidden_states=x,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        routing=routing(
            expert_map=expert_map,
            global_redundant_expert_num=0,
            mc2_mask=mc2_mask,
            apply_router_weight_on_input=False,
        ),
        quant=quant(),  # nothing is quantized on the way
    )


def _event() -> Any:
    npu: Any = torch
    return npu.npu.current_stream().record_event()
