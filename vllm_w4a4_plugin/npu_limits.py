# SPDX-License-Identifier: Apache-2.0
"""What the NPU operators of Atlas A2 and A3 can do with a layer, from their documents. Imports nothing.

Used by the loader (which kernel a layer gets) and by `vllm-w4a4 doctor` (which it will get).
"""

KRONECKER = "npu_kronecker_quant + npu_quant_matmul"
UNFUSED = "matmul + npu_dynamic_quant + npu_quant_matmul"
UNTRANSFORMED = "npu_dynamic_quant + npu_quant_matmul"
"""Kernels that a layer can get, as the start-up table and the doctor name them."""

INT4_PER_WORD = 8
"""int4 values in one int32 of the operators' packed tensors."""

KRONECKER_FACTOR_LIMIT = 256
KRONECKER_RIGHT_MULTIPLE = INT4_PER_WORD
KRONECKER_TOKENS = 262144
"""Tokens in one call of npu_kronecker_quant (aclnnFlatQuant)."""
KRONECKER_TOKENS_OLD_CANN = 32768
"""The same before the CANN of November 2025."""

MATMUL_AXIS_LIMIT = 65535
"""Input features of npu_quant_matmul (aclnnQuantMatmulV4) with int4."""

EXACT_CLAMP_CLIP = 14 / 15
"""Smallest clip ratio for which the unfused path equals the formula: below it a value could round to -8, and
npu_dynamic_quant never gives -8."""


def kronecker_obstacle(left: int | None, right: int | None) -> str:
    """Why npu_kronecker_quant cannot transform with factors of these sizes (None: no such factor), "" if it can."""
    missing = [name for name, size in (("left_trans", left), ("right_trans", right)) if size is None]
    if left is None or right is None:
        return f"no {' and no '.join(missing)}, npu_kronecker_quant needs both"
    if max(left, right) > KRONECKER_FACTOR_LIMIT:
        return f"factors {left} x {right}, npu_kronecker_quant takes at most {KRONECKER_FACTOR_LIMIT}"
    if right % KRONECKER_RIGHT_MULTIPLE:
        return f"right_trans of size {right}, npu_kronecker_quant needs a multiple of {KRONECKER_RIGHT_MULTIPLE}"
    return ""


def matmul_obstacle(in_features: int, groups: int = 1) -> str:
    """Why no int4 product of the NPU can take a layer of so many input features on a rank, "" if one can."""
    if in_features % INT4_PER_WORD:
        return f"{in_features} input features, int4 operators of the NPU need a multiple of {INT4_PER_WORD}"
    if in_features > MATMUL_AXIS_LIMIT:
        return f"{in_features} input features, npu_quant_matmul takes at most {MATMUL_AXIS_LIMIT}"
    if groups > 1:
        return f"{groups} scale groups in a row, the NPU path has per-channel scales only"
    return ""
