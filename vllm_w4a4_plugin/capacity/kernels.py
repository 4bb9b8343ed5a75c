# SPDX-License-Identifier: Apache-2.0
"""Which kernel each linear layer will get in vllm-ascend with this plugin, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU, Kind, kind_of, unsupported_reason
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.ops.npu.select import Kernel, KernelChoice, RankShape, select_kernel

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


def kernel_of(linear: LinearSpec, model: Model, ranks: int) -> KernelChoice:
    """The kernel of one layer where only CANN's operators are available; experts are left to vllm-ascend."""
    kind = kind_of(linear.name)
    if reason := unsupported_reason(linear.name, linear.quant_type, kind, backends=ON_NPU):
        return KernelChoice(Kernel.NONE, reason)
    if kind is Kind.EXPERTS:
        return KernelChoice(Kernel.VLLM_ASCEND)
    return select_kernel(RankShape.of(linear, *sizes_on_rank(linear, model, ranks)), has_fused_library=False)


def kernels_of(model: Model, ranks: int) -> Iterator[LayersOfKernel]:
    """Layers that share type, kernel and reason, in the order of the model."""
    counts: Counter[tuple[str, str, str]] = Counter()
    leaves: dict[tuple[str, str, str], dict[str, None]] = {}
    for linear in model.linears:
        choice = kernel_of(linear, model, ranks)
        key = (linear.quant_type.value, choice.kernel.value, choice.reason)
        counts[key] += 1
        leaves.setdefault(key, {})[linear.leaf] = None
    for key, count in counts.items():
        yield LayersOfKernel(" ".join(leaves[key]), key[0], count, key[1], key[2])
