# SPDX-License-Identifier: Apache-2.0
"""Which NPU kernel a linear layer gets, and why. The loader, `doctor` and the quantizer all ask here.

The limits are those in the operators' documents for Atlas A2 and A3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import NPU, QuantType

INT4_PER_WORD = 8
"""int4 values in one int32 of the operators' packed tensors."""

FRACTAL_OUTPUTS, FRACTAL_INPUTS = 16, 64
"""Size of the blocks in which the cube unit takes int4 weights."""

KRONECKER_FACTOR_LIMIT = 256
KRONECKER_RIGHT_MULTIPLE = INT4_PER_WORD
KRONECKER_TOKENS = 262144
"""Tokens in one call of npu_kronecker_quant (aclnnFlatQuant), from CANN 8.5 on."""

MATMUL_AXIS_LIMIT = 65535
"""Largest input size of npu_quant_matmul (aclnnQuantMatmulV4), and largest output size of its int8 weights, which
vllm-ascend stores by input features."""

FUSED_INPUT_LIMIT, FUSED_OUTPUT_LIMIT = 32768, 65536
"""Largest sizes of the fused kernel, as in csrc/npu/host/tiling.cpp."""

EXACT_CLAMP_CLIP = 14 / 15
"""Smallest clip ratio for which the unfused path equals the formula: below it a value could round to -8, and
npu_dynamic_quant never gives -8."""


class Kernel(StrEnum):
    """What computes a layer, by the name that the start-up table and `doctor` show."""

    FUSED = "vllm_w4a4_npu::flatquant_linear"
    KRONECKER = "npu_kronecker_quant + npu_quant_matmul"
    UNFUSED = "matmul + npu_dynamic_quant + npu_quant_matmul"
    UNTRANSFORMED = "npu_dynamic_quant + npu_quant_matmul"
    VLLM_ASCEND = "vllm-ascend"
    NONE = "none"


@dataclass(frozen=True)
class RankShape:
    """A linear layer as one rank computes it.

    Attributes:
        quant_type: its type.
        output_size, input_size: of the weight on this rank, shards of a fused layer together.
        groups: scales per output row of the whole layer.
        left, right: sizes of the transform's factors, None where one is missing; of the whole layer.
        is_row_parallel: whether the input features are split over ranks.
    """

    quant_type: QuantType
    output_size: int
    input_size: int
    groups: int = 1
    left: int | None = None
    right: int | None = None
    is_row_parallel: bool = False

    @classmethod
    def of(cls, spec: LinearSpec, output_size: int | None = None, input_size: int | None = None) -> "RankShape":
        """The layer `spec` with the sizes that it has on a rank, by default its own."""
        width = spec.input_size if input_size is None else input_size
        return cls(
            spec.quant_type,
            spec.output_size if output_size is None else output_size,
            width,
            spec.groups,
            spec.left,
            spec.right,
            width != spec.input_size,
        )


NOTHING_BROKEN: Mapping[Kernel, str] = MappingProxyType({})


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, and the reason why no better one can compute the layer; "" for the best one that is available."""

    kernel: Kernel
    reason: str = ""


def select_kernel(
    shape: RankShape, *, has_fused_library: bool, broken: Mapping[Kernel, str] = NOTHING_BROKEN
) -> KernelChoice:
    """The kernel of one layer: fused library, npu_kronecker_quant, or products and npu_dynamic_quant, in this order.

    `Kernel.NONE` means that no kernel can compute the layer; `Kernel.VLLM_ASCEND` that vllm-ascend runs it.

    Args:
        shape: of the layer on this rank.
        has_fused_library: whether the fused library can be used.
        broken: kernels that fail on this machine, and how; they are not chosen.
    """
    kind = shape.quant_type.spec
    if NPU not in kind.runs_on:
        reason = int8_unsupported_reason(shape)
        return KernelChoice(Kernel.NONE if reason else Kernel.VLLM_ASCEND, reason)
    if reason := matmul_unsupported_reason(shape):
        return KernelChoice(Kernel.NONE, reason)
    reason = fused_unsupported_reason(shape) if has_fused_library else ""
    candidates = [KernelChoice(Kernel.FUSED)] if has_fused_library and not reason else []
    if not kind.has_transform:
        candidates.append(KernelChoice(Kernel.UNTRANSFORMED, reason))
    elif unfused_reason := kronecker_unsupported_reason(shape.left, shape.right):
        candidates.append(KernelChoice(Kernel.UNFUSED, unfused_reason))
    else:
        candidates += [KernelChoice(Kernel.KRONECKER, reason), KernelChoice(Kernel.UNFUSED, reason)]
    faults = [f"self check: {kernel} {fault}" for kernel, fault in broken.items()]
    for choice in candidates:
        if choice.kernel not in broken:
            return KernelChoice(choice.kernel, "; ".join(filter(None, (*faults, choice.reason))))
    return KernelChoice(Kernel.NONE, "; ".join(faults))


def int8_unsupported_reason(shape: RankShape) -> str:
    """Why vllm-ascend's int8 matrix product cannot compute the layer, "" if it can or if the layer has another one.

    An output head has a row for each token of the vocabulary, which is more than the operator takes in most models.
    """
    kind = shape.quant_type.spec
    if not kind.weight_bits == kind.activation_bits == 8 or shape.output_size <= MATMUL_AXIS_LIMIT:
        return ""
    return (
        f"{shape.output_size} output features on a device, npu_quant_matmul takes at most {MATMUL_AXIS_LIMIT}; "
        "use more tensor-parallel ranks"
    )


def matmul_unsupported_reason(shape: RankShape) -> str:
    """Why the NPU's int4 matrix product cannot compute the layer, "" if it can."""
    if shape.input_size % INT4_PER_WORD:
        return f"{shape.input_size} input features, int4 operators of the NPU need a multiple of {INT4_PER_WORD}"
    if shape.input_size > MATMUL_AXIS_LIMIT:
        return f"{shape.input_size} input features, npu_quant_matmul takes at most {MATMUL_AXIS_LIMIT}"
    if shape.groups > 1:
        return f"{shape.groups} scale groups per row, the NPU kernels take per-channel scales only"
    return ""


def kronecker_unsupported_reason(left: int | None, right: int | None) -> str:
    """Why npu_kronecker_quant cannot transform with factors of these sizes (None: no such factor), "" if it can."""
    missing = [name for name, size in (("left_trans", left), ("right_trans", right)) if size is None]
    if left is None or right is None:
        return f"no {' and no '.join(missing)}, npu_kronecker_quant needs both"
    if max(left, right) > KRONECKER_FACTOR_LIMIT:
        return f"factors {left} x {right}, npu_kronecker_quant takes at most {KRONECKER_FACTOR_LIMIT}"
    if right % KRONECKER_RIGHT_MULTIPLE:
        return f"right_trans of size {right}, npu_kronecker_quant needs a multiple of {KRONECKER_RIGHT_MULTIPLE}"
    return ""


def fused_unsupported_reason(shape: RankShape) -> str:
    """Why the project's fused kernel cannot compute the layer, "" if it can.

    Only sizes that the nZ order stores without padding are supported, so that a weight is rearranged in place and can
    be loaded again.
    """
    outputs, inputs = shape.output_size, shape.input_size
    if shape.is_row_parallel and shape.quant_type.spec.has_transform:
        return "fused kernel: tokens of a row-parallel layer are quantized before they are split"
    if shape.is_row_parallel and not envs.VLLM_W4A4_LOCAL_SCALES:
        return "fused kernel: a row-parallel layer needs the scale of the whole token, which it cannot take"
    if outputs % FRACTAL_OUTPUTS or inputs % FRACTAL_INPUTS:
        return f"fused kernel: weight {outputs} x {inputs} is not made of {FRACTAL_OUTPUTS} x {FRACTAL_INPUTS} fractals"
    if outputs > FUSED_OUTPUT_LIMIT or inputs > FUSED_INPUT_LIMIT:
        return f"fused kernel: weight {outputs} x {inputs}, at most {FUSED_OUTPUT_LIMIT} x {FUSED_INPUT_LIMIT}"
    if shape.left is not None or shape.right is not None:
        m = shape.left or inputs // (shape.right or inputs)
        n = inputs // m
        if not (2 <= m <= KRONECKER_FACTOR_LIMIT and n <= KRONECKER_FACTOR_LIMIT and n % KRONECKER_RIGHT_MULTIPLE == 0):
            return f"fused kernel: transform {m} x {n}, at most 256 x 256 and the second a multiple of 8"
    return ""
