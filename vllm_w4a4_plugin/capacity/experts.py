# SPDX-License-Identifier: Apache-2.0
"""The W4A4 experts of a model as one device computes them in vllm-ascend with this plugin."""

from dataclasses import replace

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.experts import EXPERTS, PROJECTIONS, undividable_experts
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import NPU
from vllm_w4a4_plugin.ops.npu.select_experts import ExpertsOnRank

from .model import Model

DOWN = tuple(names[2] for names in PROJECTIONS)


def layer_of(linear: LinearSpec) -> str:
    """Prefix of the layer of experts that a projection belongs to, `...mlp.experts`."""
    return f"{linear.name.rpartition(f'.{EXPERTS}.')[0]}.{EXPERTS}"


def is_ours(linear: LinearSpec) -> bool:
    """Whether it is a projection of experts that the plugin computes on NPUs."""
    return kind_of(linear.name) is Kind.EXPERTS and NPU in linear.quant_type.spec.experts_run_on


def experts_on_rank(model: Model, ranks: int) -> dict[str, ExpertsOnRank]:
    """Prefix -> experts of each layer whose experts the plugin computes, divided over tensor-parallel ranks."""
    gate_up: dict[str, LinearSpec] = {}
    down: dict[str, LinearSpec] = {}
    for linear in filter(is_ours, model.linears):
        (down if linear.leaf in DOWN else gate_up).setdefault(layer_of(linear), linear)
    parts = 1 if model.has_whole_experts else ranks
    return {name: ExpertsOnRank(gate_up[name], down[name], model.experts, parts) for name in gate_up}


def on_expert_parallel_rank(model: Model, ranks: int) -> Model:
    """The model with those experts only that the first of the expert-parallel ranks holds, which has the most.

    Raises:
        CheckpointError: the plugin computes the experts, and their number cannot be divided.
    """
    for linear in filter(is_ours, model.linears):
        if reason := undividable_experts(layer_of(linear), model.experts, ranks):
            raise CheckpointError(reason)
    count = -(-model.experts // ranks)
    here = tuple(linear for linear in model.linears if _number(linear) < count)
    return replace(
        model,
        linears=here,
        experts=count,
        experts_per_token=model.experts_per_token * count / model.experts,
        has_whole_experts=True,
    )


def _number(linear: LinearSpec) -> int:
    """Of the expert that a linear layer belongs to; -1 for others."""
    number = linear.name.rpartition(f".{EXPERTS}.")[2].partition(".")[0]
    return int(number) if kind_of(linear.name) is Kind.EXPERTS and number.isdecimal() else -1
