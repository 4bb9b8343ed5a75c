# SPDX-License-Identifier: Apache-2.0
"""Which kernel each linear layer and each layer of experts will get in vllm-ascend with this plugin, and why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU, Kind, kind_of, unsupported_reason
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.ops.npu.select import Kernel, KernelChoice, RankShape, select_kernel
from vllm_w4a4_plugin.ops.npu.select_experts import ExpertsChoice, ExpertsOnRank, select_experts_kernel

from .experts import experts_on_rank, is_ours, layer_of
from .model import Model
from .partition import sizes_on_rank


@dataclass(frozen=True)
class LayersOfKernel:
    """A kernel and the layers that get it.

    Attributes:
        layers: names of the projections, e.g. "q_proj k_proj v_proj".
        quant_type, count: of the layers.
        kernel: a `select.Kernel`.
        reason: why they get no better one.
    """

    layers: str
    quant_type: str
    count: int
    kernel: str
    reason: str


def kernel_of(
    linear: LinearSpec, model: Model, ranks: int, experts: Mapping[str, ExpertsOnRank] | None = None
) -> KernelChoice | ExpertsChoice:
    """The kernel of one layer where only CANN's operators are available.

    Args:
        linear: the layer, or a projection of an expert, which gets the kernels of all experts of its layer.
        model: whose it is.
        ranks: of the tensor parallelism.
        experts: `experts_on_rank(model, ranks)`, if it is at hand.
    """
    kind = kind_of(linear.name)
    if reason := unsupported_reason(linear.name, linear.quant_type, kind, backends=ON_NPU, file=""):
        return KernelChoice(Kernel.NONE, reason)
    if kind is Kind.EXPERTS:
        if not is_ours(linear):
            return KernelChoice(Kernel.VLLM_ASCEND)
        layers = experts_on_rank(model, ranks) if experts is None else experts
        return select_experts_kernel(layers[layer_of(linear)])
    return select_kernel(RankShape.of(linear, *sizes_on_rank(linear, model, ranks)), has_fused_library=False)


def kernels_of(model: Model, ranks: int) -> Iterator[LayersOfKernel]:
    """Layers that share type, kernel and reason, in the order of the model; the output head only if it is quantized."""
    counts: Counter[tuple[str, str, str]] = Counter()
    leaves: dict[tuple[str, str, str], dict[str, None]] = {}
    experts = experts_on_rank(model, ranks)
    heads = [model.head] if model.head and model.head.quant_type.spec.is_quantized else []
    for linear in (*model.linears, *heads):
        choice = kernel_of(linear, model, ranks, experts)
        key = (linear.quant_type.value, str(choice.kernel), choice.reason)
        counts[key] += 1
        leaves.setdefault(key, {})[linear.leaf] = None
    for key, count in counts.items():
        yield LayersOfKernel(" ".join(leaves[key]), key[0], count, key[1], key[2])
