# SPDX-License-Identifier: Apache-2.0
"""Tokens that are not finite, through vllm-ascend's layers on the stand-in's operators.

The stand-in's maximum propagates NaN; CANN's documents do not say whether the device's does. What is documented of
infinities, and what our own code adds before npu_dynamic_quant, holds without that.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from tests.npu.linears import DYNAMIC, Linear, inputs, output
from vllm_w4a4_plugin.ops.npu.select import Kernel

pytestmark = pytest.mark.usefixtures("config")

LINEARS = [
    (Linear(48, 192, bias=True), Kernel.KRONECKER),
    (Linear(48, 192, 12, None, bias=True), Kernel.UNFUSED),
    (Linear(48, 192, None, 16, clip=1.0, bias=True), Kernel.UNFUSED),
    (Linear(48, 192, kind=DYNAMIC, bias=True), Kernel.UNTRANSFORMED),
]


def poisoned(dtype: torch.dtype, value: float) -> torch.Tensor:
    x = inputs(192, dtype=dtype)
    x[2, 0] = x[5, 100] = value
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("linear", "kernel"), LINEARS)
def test_no_output_of_such_a_token_is_finite(
    column: Callable[..., Any], linear: Linear, kernel: Kernel, value: float, dtype: torch.dtype
) -> None:
    layer = column(linear, params_dtype=dtype)
    assert layer.quant_method.scheme.operator == kernel
    y, clean = output(layer, poisoned(dtype, value)), output(layer, inputs(192, dtype=dtype))
    assert not y[[2, 5]].isfinite().any()
    assert y[[2, 5]].isnan().all() or not math.isnan(value)
    others = [0, 1, 3, 4, 6]
    assert torch.equal(y[others], clean[others])


def test_clipping_hands_npu_dynamic_quant_nan_only(column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the operator's maximum makes of NaN, it has nothing else to find."""
    layer = column(Linear(48, 192, 12, None, clip=0.97))
    seen = []
    quantize = torch_npu.npu_dynamic_quant

    def watched(x: torch.Tensor, **arguments: Any) -> Any:
        seen.append(x)
        return quantize(x, **arguments)

    monkeypatch.setattr(torch_npu, "npu_dynamic_quant", watched)
    output(layer, poisoned(torch.bfloat16, math.nan))
    (x,) = seen
    assert x.isnan().all(-1).tolist() == [False, False, True, False, False, True, False]
    assert x[[0, 1, 3, 4, 6]].isfinite().all()
