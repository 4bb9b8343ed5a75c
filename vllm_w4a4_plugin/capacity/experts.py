# SPDX-License-Identifier: Apache-2.0
"""The W4A4 experts of a model as one device computes them in vllm-ascend with this plugin."""

from vllm_w4a4_plugin.checkpoint.experts import EXPERTS, PROJECTIONS
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
    return {name: ExpertsOnRank(gate_up[name], down[name], model.experts, ranks) for name in gate_up}
