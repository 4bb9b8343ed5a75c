# SPDX-License-Identifier: Apache-2.0
"""Which kernel each linear layer will get beside vllm-ascend, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.npu_limits import KRONECKER, UNFUSED, UNTRANSFORMED, kronecker_obstacle, matmul_obstacle

from .memory import shape_on_rank
from .model import Linear, Model

THEIRS = "vllm-ascend"
NONE = "none"


@dataclass(frozen=True)
class KernelChoice:
    """A kernel and the layers that get it.

    Attributes:
        layers: names of the projections, e.g. "q_proj k_proj v_proj".
        quant_type, count: of the layers.
        kernel: KRONECKER, UNFUSED, UNTRANSFORMED, THEIRS, or NONE if no kernel can take them.
        reason: why not KRONECKER, "" for the others' usual kernel.
    """

    layers: str
    quant_type: str
    count: int
    kernel: str
    reason: str


def choose_kernel(linear: Linear, model: Model, ranks: int) -> tuple[str, str]:
    """(kernel, reason) of one layer with the operators of CANN, as `quantization.schemes.w4a4_npu` will choose."""
    if linear.quant_type not in (QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W4A4_DYNAMIC):
        return THEIRS, ""
    _, columns = shape_on_rank(linear, model, ranks)
    if problem := matmul_obstacle(columns, linear.groups):
        return NONE, problem
    if linear.quant_type == QuantType.W4A4_DYNAMIC:
        return UNTRANSFORMED, ""
    if problem := kronecker_obstacle(linear.left, linear.right):
        return UNFUSED, problem
    return KRONECKER, ""


def choose_kernels(model: Model, ranks: int) -> Iterator[KernelChoice]:
    """Layers that share type, kernel and reason, in the order of the model."""
    counts: Counter[tuple[str, str, str]] = Counter()
    leaves: dict[tuple[str, str, str], dict[str, None]] = {}
    for linear in model.linears:
        key = (linear.quant_type, *choose_kernel(linear, model, ranks))
        counts[key] += 1
        leaves.setdefault(key, {})[linear.leaf] = None
    for key, count in counts.items():
        yield KernelChoice(" ".join(leaves[key]), key[0], count, key[1], key[2])
