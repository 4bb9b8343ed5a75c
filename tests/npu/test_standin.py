# SPDX-License-Identifier: Apache-2.0
"""The stand-in refuses what the documents exclude and computes what they say, by other code than the reference."""

from typing import Any

import numpy as np
import pytest
import torch
import torch_npu
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.ops import reference

BF16, FP16 = torch.bfloat16, torch.float16


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., k] -> int8 [..., 8 k], by reading the bytes: the low nibble of each comes first."""
    data = words.contiguous().numpy().view(np.uint8)
    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(*words.shape[:-1], -1).astype(np.int8)
    return torch.from_numpy(np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_packing(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, 8 * words), dtype=torch.int32, generator=generator)
    packed = torch_npu.npu_convert_weight_to_int4pack(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert torch.equal(unpacked(packed).int(), values)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("left", "right"), [(12, 16), (1, 8), (64, 80), (256, 256)])
@pytest.mark.parametrize("clip", [1.0, 0.87])
def test_kronecker_quant(dtype: torch.dtype, left: int, right: int, clip: float) -> None:
    generator = torch.Generator().manual_seed(left)
    x = torch.randn(3, left * right, generator=generator).to(dtype)
    l_trans = (torch.randn(left, left, generator=generator) / left**0.5).to(dtype)
    r_trans = (torch.randn(right, right, generator=generator) / right**0.5).to(dtype)
    q, scale = torch_npu.npu_kronecker_quant(
        x.view(3, left, right), l_trans.t().contiguous(), r_trans, clip_ratio=clip, dst_dtype=torch.int32
    )
    expected, expected_scale = reference.kronecker_quant_npu(x, l_trans, r_trans, clip)
    found = unpacked(q).reshape(3, -1)
    # The order of summation differs, so now and then a product is rounded the other way, to 8 bits for bfloat16.
    assert (found != expected).float().mean() < 0.02
    assert (found - expected).abs().max() <= 1
    assert torch.allclose(scale, expected_scale, rtol=2**-7 if dtype == BF16 else 2**-9)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "out"])
def test_int4_matmul(dtype: torch.dtype, bias_dtype: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 8, (5, 64), dtype=torch.int32, generator=generator)
    weight = torch.randint(-8, 8, (24, 64), dtype=torch.int32, generator=generator)
    scale, token_scale = torch.rand(24, generator=generator), torch.rand(5, generator=generator)
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(24, generator=generator).to(dtype if bias_dtype == "out" else bias_dtype)
    pack = torch_npu.npu_convert_weight_to_int4pack
    y = torch_npu.npu_quant_matmul(
        pack(q), pack(weight).t(), scale, pertoken_scale=token_scale, bias=bias, output_dtype=dtype
    )
    expected = reference.int4_linear(q, token_scale, weight, scale, bias, None, dtype)
    assert torch.allclose(y.float(), expected.float(), rtol=2**-7)
    # The other layout of the documents: [in, out / 8].
    other = torch_npu.npu_quant_matmul(
        pack(q), pack(weight.t().contiguous()), scale, pertoken_scale=token_scale, bias=bias, output_dtype=dtype
    )
    assert torch.equal(other, y)


def test_dynamic_quant() -> None:
    x = torch.tensor([[7.0, -7.0, 3.4, 0.6] * 2, [0.0] * 8]).to(BF16)
    q, scale = torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
    assert unpacked(q).tolist() == [[7, -7, 3, 1] * 2, [0] * 8]
    assert scale.tolist() == [1.0, 0.0]
    q8, scale8 = torch_npu.npu_dynamic_quant(x)
    assert q8[0, :2].tolist() == [127, -127]
    assert scale8[0].item() == pytest.approx(7 / 127)


def kronecker(tokens: int = 2, left: int = 8, right: int = 8, **other: Any) -> Any:
    arguments = {
        "x": torch.ones(tokens, left, right, dtype=BF16),
        "kronecker_p1": torch.eye(left, dtype=BF16),
        "kronecker_p2": torch.eye(right, dtype=BF16),
        "clip_ratio": 1.0,
        "dst_dtype": torch.int32,
    }
    return torch_npu.npu_kronecker_quant(**{**arguments, **other})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"left": 257}, "257"),
        ({"right": 264}, "264"),
        ({"right": 12}, "multiple of 8"),
        ({"tokens": 262145}, "at most 262144"),
        ({"clip_ratio": 0.0}, "(0, 1]"),
        ({"clip_ratio": 1.01}, "(0, 1]"),
        ({"clip_ratio": torch.tensor(1.0)}, "must be a number"),
        ({"x": torch.ones(2, 64, dtype=BF16)}, "three dimensions"),
        ({"x": torch.ones(0, 8, 8, dtype=BF16)}, "not be empty"),
        ({"x": torch.ones(2, 8, 8)}, "float16 or bfloat16"),
        ({"kronecker_p1": torch.eye(8)}, "differ in dtype"),
        ({"kronecker_p2": torch.eye(16, dtype=BF16)}, "P2 must be"),
        ({"dst_dtype": torch.int8}, "int32"),
    ],
)
def test_kronecker_quant_refuses(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(RuntimeError) as error:
        kronecker(**arguments)
    assert problem in str(error.value)


def matmul(**other: Any) -> Any:
    arguments = {
        "x1": torch.zeros(3, 2, dtype=torch.int32),
        "x2": torch.zeros(8, 2, dtype=torch.int32).t(),
        "scale": torch.ones(8),
        "pertoken_scale": torch.ones(3),
        "output_dtype": BF16,
    }
    return torch_npu.npu_quant_matmul(**{**arguments, **other})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"x1": torch.zeros(3, 4, dtype=torch.int32)[:, ::2]}, "x1 must be contiguous"),
        ({"x2": torch.zeros(16, 2, dtype=torch.int32)[::2].t()}, "x2 must be contiguous or the transpose"),
        ({"x2": torch.zeros(8, 3, dtype=torch.int32).t()}, "x1 has 16 columns, x2 has 24 rows"),
        ({"x2": torch.zeros(8, 2, dtype=torch.int8).t()}, "x1 is torch.int32"),
        ({"scale": torch.ones(8, 1)}, "scale"),
        ({"scale": torch.ones(8, dtype=FP16)}, "scale"),
        ({"pertoken_scale": torch.ones(3, 1)}, "pertoken_scale must be float32 [3]"),
        ({"pertoken_scale": torch.ones(3, dtype=BF16)}, "pertoken_scale must be float32"),
        ({"bias": torch.ones(8, dtype=FP16)}, "bias"),
        ({"bias": torch.ones(1, 8)}, "bias"),
        ({"output_dtype": torch.float32}, "output_dtype"),
        ({"output_dtype": FP16, "scale": torch.ones(8, dtype=BF16)}, "scale"),
    ],
)
def test_quant_matmul_refuses(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(RuntimeError) as error:
        matmul(**arguments)
    assert problem in str(error.value)


def test_an_axis_beyond_the_limit_is_refused() -> None:
    x1 = torch.zeros(1, 8192, dtype=torch.int32)  # 65536 int4 values
    with pytest.raises(RuntimeError, match="exceed 65535"):
        matmul(x1=x1, x2=torch.zeros(8, 8192, dtype=torch.int32).t(), pertoken_scale=torch.ones(1))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 8, dtype=torch.int8),
        torch.zeros(2, 12, dtype=torch.int32),
        torch.zeros(8, 8, dtype=torch.int32).t()[:, ::2],
        torch.full((2, 8), 8, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
    ],
)
def test_packing_refuses(weight: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="aclnnConvertWeightToINT4Pack"):
        torch_npu.npu_convert_weight_to_int4pack(weight)


def test_dynamic_quant_refuses() -> None:
    for x, kind in (
        (torch.ones(2, 12, dtype=BF16), torch.quint4x2),
        (torch.ones(2, 8), None),
        (torch.ones(8).half(), None),
    ):
        with pytest.raises(RuntimeError, match="aclnnDynamicQuant"):
            torch_npu.npu_dynamic_quant(x, dst_type=kind)


def test_what_is_not_there_cannot_be_called() -> None:
    with pytest.raises(AttributeError):
        torch_npu.npu_weight_quant_batchmatmul  # noqa: B018
    with pytest.raises(NotImplementedError):
        torch_npu.npu_fusion_attention()
