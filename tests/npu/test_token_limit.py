# SPDX-License-Identifier: Apache-2.0
"""npu_kronecker_quant takes a limited number of tokens in one call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from tests.npu.linears import Linear, inputs, output
from vllm_w4a4_plugin.ops.npu import cann, select

pytestmark = pytest.mark.usefixtures("config")


def test_the_limit_is_the_operators() -> None:
    assert torch_npu.operators.kronecker_token_limit == select.KRONECKER_TOKENS


def test_split_only_beyond_it(column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    linear = Linear(48, 192)
    layer, x = column(linear), inputs(192, 40)
    whole = output(layer, x)
    monkeypatch.setattr(torch_npu.operators, "kronecker_token_limit", 16)
    monkeypatch.setattr(cann, "KRONECKER_TOKENS", 16)
    for tokens, expected in ((16, 1), (17, 2), (40, 3)):
        calls.clear()
        assert torch.equal(output(layer, x[:tokens]), whole[:tokens])
        assert [name for name, _ in calls].count("npu_kronecker_quant") == expected
