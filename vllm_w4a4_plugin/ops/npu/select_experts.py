# SPDX-License-Identifier: Apache-2.0
"""Which NPU kernels the routed experts of a layer get, and why. The loader, `doctor` and the device check all ask here.

The limits are those of aclnnGroupedMatmulV5 for int4 x int4 ("A4W4") on Atlas A2 and A3:
https://gitcode.com/cann/ops-transformer/blob/master/gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import QuantType

from .select import INT4_PER_WORD, Kernel, kronecker_unsupported_reason

GROUPED_AXIS_LIMIT = 65535
"""Largest last axis of a tensor of npu_grouped_matmul, and of npu_quant_matmul with int4."""

GROUPED_EXPERTS_LIMIT = 1024
"""Experts on one device: groups of npu_grouped_matmul with all weights in one tensor."""


class Product(StrEnum):
    """How int4 tokens are multiplied by the weights of their experts."""

    GROUPED = "npu_grouped_matmul"
    PER_EXPERT = "npu_quant_matmul for each expert"
    NONE = "none"


QUANTIZERS = {
    Kernel.KRONECKER: "npu_kronecker_quant",
    Kernel.UNFUSED: "matmul + npu_dynamic_quant",
    Kernel.UNTRANSFORMED: "npu_dynamic_quant",
}
"""What quantizes the input of gate and up, by the kernel of a linear layer that quantizes so -> its name in tables."""


@dataclass(frozen=True)
class ExpertsOnRank:
    """The routed experts of one layer as one device computes them.

    Attributes:
        gate_up, down: of the whole layer; all experts agree in them.
        experts: on this device.
        ranks: among which each expert's intermediate features are split (tensor parallelism).
    """

    gate_up: LinearSpec
    down: LinearSpec
    experts: int
    ranks: int = 1

    @property
    def quant_type(self) -> QuantType:
        """Of the experts."""
        return self.gate_up.quant_type

    @property
    def hidden(self) -> int:
        """Input features of gate and up."""
        return self.gate_up.input_size

    @property
    def intermediate(self) -> int:
        """Intermediate features of an expert on this device, rounded down."""
        return self.down.input_size // self.ranks

    @property
    def has_bias(self) -> bool:
        """Whether any of the projections has one."""
        return self.gate_up.has_bias or self.down.has_bias

    @property
    def groups(self) -> tuple[int, int]:
        """Weight scales per row, of gate and up and of down, on this device."""
        split = self.down.groups // self.ranks if self.down.groups > 1 else 1
        return self.gate_up.groups, split


@dataclass(frozen=True)
class ExpertsChoice:
    """The kernels of a layer of experts.

    Attributes:
        product: of int4 tokens and weights.
        quantizer: key of `QUANTIZERS`, of the input of gate and up. (That of down is transformed by grouped products,
            with the factors of each token's expert, and quantized by npu_dynamic_quant.)
        reason: why there are no better ones; "" for the best.
    """

    product: Product
    quantizer: Kernel = Kernel.NONE
    reason: str = ""

    @property
    def kernel(self) -> str:
        """The name that the start-up table and `doctor` show; `Kernel.NONE` if nothing can compute the layer."""
        if self.product is Product.NONE:
            return Kernel.NONE
        return f"{QUANTIZERS[self.quantizer]} + {self.product}"


def select_experts_kernel(
    shape: ExpertsOnRank, *, broken: Mapping[Kernel | Product, str] = MappingProxyType({})
) -> ExpertsChoice:
    """The kernels of the routed experts of one layer.

    Args:
        shape: of the experts on this device.
        broken: kernels that fail on this machine, and how; they are not chosen.
    """
    if reason := unsupported_experts_reason(shape):
        return ExpertsChoice(Product.NONE, reason=reason)
    faults = {kernel: f"self check: {kernel} {fault}" for kernel, fault in broken.items()}
    reasons = list(faults.values())
    products = [Product.GROUPED, Product.PER_EXPERT]
    if shape.has_bias:
        reasons.append("npu_grouped_matmul adds no bias to int4 products")
        products.remove(Product.GROUPED)
    if max(shape.groups) > 1:
        products.remove(Product.PER_EXPERT)
    product = next((product for product in products if product not in broken), Product.NONE)
    quantizers = [Kernel.UNTRANSFORMED]
    if shape.quant_type.spec.has_transform:
        quantizers = [Kernel.KRONECKER, Kernel.UNFUSED]
        if reason := kronecker_unsupported_reason(shape.gate_up.left, shape.gate_up.right):
            reasons.append(reason)
            quantizers.remove(Kernel.KRONECKER)
    quantizer = next((kernel for kernel in quantizers if kernel not in broken), Kernel.NONE)
    if quantizer is Kernel.NONE:
        product = Product.NONE
    return ExpertsChoice(product, quantizer, "; ".join(reasons))


def unsupported_experts_reason(shape: ExpertsOnRank) -> str:
    """Why no NPU kernel can compute the experts, "" if one can."""
    whole = shape.down.input_size
    if whole % shape.ranks:
        return f"{whole} intermediate features cannot be divided over {shape.ranks} devices"
    for size, what in ((shape.hidden, "hidden"), (shape.intermediate, "intermediate")):
        if size % INT4_PER_WORD:
            return f"{size} {what} features, int4 operators of the NPU need a multiple of {INT4_PER_WORD}"
    largest = max(shape.hidden, 2 * shape.intermediate)
    if largest > GROUPED_AXIS_LIMIT:
        return f"{largest} features, {Product.GROUPED} takes at most {GROUPED_AXIS_LIMIT}"
    if shape.experts > GROUPED_EXPERTS_LIMIT:
        return f"{shape.experts} experts on a device, {Product.GROUPED} takes at most {GROUPED_EXPERTS_LIMIT}"
    return _unsupported_groups(shape)


def _unsupported_groups(shape: ExpertsOnRank) -> str:
    if shape.down.groups > 1 and shape.down.groups % shape.ranks:
        return f"{shape.down.groups} scale groups per row of down cannot be divided over {shape.ranks} devices"
    for size, groups in zip((shape.hidden, shape.intermediate), shape.groups, strict=True):
        if groups > 1 and (size % groups or size // groups % 2):
            return f"scale groups of {size / groups:g} features, {Product.GROUPED} needs an even number"
    if shape.has_bias and max(shape.groups) > 1:
        return f"biases and scale groups, {Product.GROUPED} takes no bias and npu_quant_matmul no groups"
    return ""
