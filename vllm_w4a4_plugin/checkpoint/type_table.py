# SPDX-License-Identifier: Apache-2.0
"""The quant types that come with the package. Importing the package registers them."""

from .types import (
    BIAS_TENSOR,
    CLIP_RATIO,
    CPU,
    DEQ_SCALE,
    FLOAT_DTYPES,
    INPUT_OFFSET,
    INPUT_SCALE,
    INT4_DTYPES,
    LEFT_TRANS,
    NPU,
    QUANT_BIAS,
    RIGHT_TRANS,
    SCALE_BIAS,
    VLLM_ASCEND,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_OFFSET_SECOND,
    WEIGHT_SCALE,
    WEIGHT_SCALE_SECOND,
    Layout,
    QuantType,
    TensorSpec,
    TypeSpec,
    quantized_tensors,
    register_type,
)
from .values import clip_ratio, deq_scales, finite, int4, positive, scales, zeros

_TRANSFORM_TENSORS = (
    # A factor that is not stored is the identity.
    TensorSpec(LEFT_TRANS, Layout.SQUARE, required=False, check=finite, is_shared=True),
    TensorSpec(RIGHT_TRANS, Layout.SQUARE, required=False, check=finite, is_shared=True),
    TensorSpec(CLIP_RATIO, Layout.ONE_VALUE, check=clip_ratio),
)

_SECOND_TENSORS = (
    TensorSpec(WEIGHT_SCALE_SECOND, Layout.SECOND_SCALES, required=False, check=scales),
    TensorSpec(WEIGHT_OFFSET_SECOND, Layout.LIKE_SECOND_SCALES, required=False, check=zeros),
)

_SCALE_BIAS_TENSOR = TensorSpec(SCALE_BIAS, Layout.ROWS, required=False)
"""8 times the sum of a row's dequantized weights, for NPU kernels that compute with unsigned weights."""

_STATIC_TENSORS = (
    TensorSpec(WEIGHT, Layout.MATRIX, ("I8",)),
    TensorSpec(INPUT_SCALE, Layout.ONE_VALUE, check=positive, is_shared=True),
    TensorSpec(INPUT_OFFSET, Layout.ONE_VALUE, (*FLOAT_DTYPES, "I8", "I32"), check=finite, is_shared=True),
    TensorSpec(QUANT_BIAS, Layout.ROW, ("I32",)),
    TensorSpec(DEQ_SCALE, Layout.ROW, ("F32", "I64"), check=deq_scales),
    # Contained in deq_scale; older releases store them too.
    TensorSpec(WEIGHT_SCALE, Layout.SCALES, required=False, check=scales),
    TensorSpec(WEIGHT_OFFSET, Layout.LIKE_SCALES, (*FLOAT_DTYPES, "I8"), required=False, check=zeros),
)

_FLOAT_WEIGHT = TensorSpec(WEIGHT, Layout.MATRIX, check=finite)

_BUILT_IN = (
    TypeSpec(
        "FLOAT",
        16,
        16,
        (_FLOAT_WEIGHT, BIAS_TENSOR),
        runs_on=frozenset({CPU, VLLM_ASCEND}),
        experts_run_on=frozenset({CPU, VLLM_ASCEND}),
    ),
    TypeSpec(
        "W8A8_DYNAMIC",
        8,
        8,
        (*quantized_tensors(offsets=zeros), BIAS_TENSOR),
        runs_on=frozenset({CPU, VLLM_ASCEND}),
        experts_run_on=frozenset({CPU, VLLM_ASCEND}),
        head_runs_on_cpu=True,
    ),
    # Per channel and, with the same name, per group: the shape of weight_scale tells them apart.
    TypeSpec(
        "W4A4_DYNAMIC",
        4,
        4,
        (*quantized_tensors(int4, dtypes=INT4_DTYPES), BIAS_TENSOR),
        frozenset({CPU, NPU}),
        frozenset({CPU, NPU}),
        has_groups=True,
    ),
    TypeSpec(
        "W4A4_FLATQUANT_DYNAMIC",
        4,
        4,
        (*quantized_tensors(int4, dtypes=INT4_DTYPES), *_TRANSFORM_TENSORS, BIAS_TENSOR),
        frozenset({CPU, NPU}),
        frozenset({CPU, NPU}),
        has_groups=True,
    ),
    TypeSpec("W8A8", 8, 8, (*_STATIC_TENSORS, BIAS_TENSOR), runs_on=frozenset({CPU, VLLM_ASCEND})),
    TypeSpec(
        "W8A8_FLATQUANT_DYNAMIC",
        8,
        8,
        (*quantized_tensors(offsets=zeros), *_TRANSFORM_TENSORS, BIAS_TENSOR),
        frozenset({CPU}),
    ),
    TypeSpec(
        "W4A8_DYNAMIC",
        4,
        8,
        (*quantized_tensors(int4, zeros, INT4_DTYPES), *_SECOND_TENSORS, _SCALE_BIAS_TENSOR, BIAS_TENSOR),
        frozenset({CPU, VLLM_ASCEND}),
        frozenset({VLLM_ASCEND}),
        may_be_packed=True,
    ),
    TypeSpec(
        "W4A8_FLATQUANT_DYNAMIC",
        4,
        8,
        (*quantized_tensors(int4, zeros, INT4_DTYPES), *_TRANSFORM_TENSORS, _SCALE_BIAS_TENSOR, BIAS_TENSOR),
        frozenset({CPU}),
        may_be_packed=True,
    ),
    TypeSpec("W8A16", 8, 16, (*quantized_tensors(), BIAS_TENSOR), frozenset({CPU, VLLM_ASCEND}), has_groups=True),
    TypeSpec(
        "W4A16",
        4,
        16,
        (*quantized_tensors(int4, dtypes=INT4_DTYPES), BIAS_TENSOR),
        frozenset({CPU}),
        frozenset({VLLM_ASCEND}),
        has_groups=True,
    ),
    # Known by name: checkpoints mix them with W4A4. What runs on them is that of vllm-ascend 0.23.
    *(
        TypeSpec(
            name,
            weight_bits,
            activation_bits,
            runs_on=frozenset({VLLM_ASCEND} if "linear" in kinds else ()),
            experts_run_on=frozenset({VLLM_ASCEND} if "experts" in kinds else ()),
        )
        for name, weight_bits, activation_bits, kinds in (
            ("W8A8_MIX", 8, 8, "linear experts"),
            ("W8A8FP8_DYNAMIC", 8, 8, "linear experts"),
            ("W8A8_MXFP8", 8, 8, "linear experts"),
            ("W4A8_MXFP", 4, 8, "linear experts"),
            ("W4A4_MXFP4", 4, 4, "linear experts"),
            ("W4A4_MXFP4_FLATQUANT", 4, 4, "linear"),
            ("W4A4_MXFP4_DUALSCALE", 4, 4, ""),
            ("W4A16_MXFP4", 4, 16, "experts"),
            ("WFP8AFP8_DYNAMIC", 8, 8, ""),
            ("W8A8_SVD", 8, 8, ""),
            ("W8A8_SVD_DYNAMIC", 8, 8, ""),
            ("W4A8_SVD_DYNAMIC", 4, 8, ""),
            ("W4A4_SVD_DYNAMIC", 4, 4, ""),
        )
    ),
)
for _spec in _BUILT_IN:
    setattr(QuantType, _spec.name, register_type(_spec))
