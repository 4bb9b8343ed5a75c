# SPDX-License-Identifier: Apache-2.0
"""The steps of a device check on the W4A4 experts of a model: a pure function, without torch."""

from collections.abc import Iterable, Iterator

from vllm_w4a4_plugin.capacity.experts import experts_on_rank
from vllm_w4a4_plugin.capacity.model import Model
from vllm_w4a4_plugin.ops.npu.select_experts import ExpertsOnRank, Product, select_experts_kernel

from .plan import BFLOAT16, TOKENS, Phase, Step

COUNTS = (3, 0, 70, 1, 0, 17)
"""Rows of each of six experts, which stand for all: none, one, and more than a tile."""


def expert_layers(model: Model, ranks: int) -> list[ExpertsOnRank]:
    """The kinds of W4A4 experts that a device computes, each once."""
    kinds: dict[tuple, ExpertsOnRank] = {}
    for shape in experts_on_rank(model, ranks).values():
        sizes = (shape.hidden, shape.intermediate, shape.groups, shape.has_bias)
        factors = (shape.gate_up.left, shape.gate_up.right, shape.down.left, shape.down.right)
        kinds.setdefault((shape.quant_type, *sizes, *factors), shape)
    return list(kinds.values())


def expert_steps(layers: Iterable[ExpertsOnRank]) -> Iterator[Step]:
    """Products of int4, quantization, transforms and activations of each kind of experts, with their own sizes."""
    for shape in layers:
        choice = select_experts_kernel(shape)
        title = f"experts {shape.hidden} x {shape.intermediate}"
        if choice.product is Product.NONE:
            yield Step("refused", Phase.CANN, title, arguments={"reason": choice.reason})
            continue
        common = {"counts": COUNTS, "dtype": BFLOAT16, "product": choice.product.value, "has_bias": shape.has_bias}
        sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
        for what, size, groups in zip(("gate and up", "down"), sizes, shape.groups, strict=True):
            arguments = {**common, "sizes": size, "scale_groups": groups}
            yield Step("expert products", Phase.CANN, f"products of {what}, {title}", str(choice.kernel), arguments)
        has_transform = shape.quant_type.spec.has_transform
        gate_up, down = shape.gate_up, shape.down
        quantized = {
            "sizes": (16, shape.hidden),
            "factors": (gate_up.left, gate_up.right) if has_transform else (None, None),
            "dtype": BFLOAT16,
            "tokens": TOKENS,
        }
        yield Step("quantize", Phase.CANN, f"q and scale, {title}", choice.quantizer.value, quantized)
        if has_transform:
            arguments = {**common, "size": down.input_size, "factors": (down.left, down.right)}
            yield Step("expert transform", Phase.CANN, f"transform of down, {title}", str(choice.kernel), arguments)
        arguments = {**common, "size": shape.intermediate}
        yield Step("expert activation", Phase.CANN, f"silu(gate) * up, {title}", str(choice.kernel), arguments)
