# SPDX-License-Identifier: Apache-2.0
"""How many tokens npu_kronecker_quant takes in one call: found by trying, once, and only where it matters."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu

from tests.npu.linears import Linear, inputs, output
from vllm_w4a4_plugin.ops.npu import cann, select

pytestmark = pytest.mark.usefixtures("config")


class TestTokenLimit:
    @pytest.fixture(autouse=True)
    def untried(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(cann, "_token_limit", select.KRONECKER_TOKENS_OLD_CANN)
        cann._try_tokens.cache_clear()
        yield
        cann._try_tokens.cache_clear()

    def test_nothing_is_tried_unless_it_matters(self, calls: list[Any]) -> None:
        assert cann.find_token_limit(32768, torch.device("cpu")) == 32768
        assert calls == []

    @pytest.mark.parametrize("limit", [32768, 262144])
    def test_found_once(self, limit: int, monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
        monkeypatch.setattr(torch_npu.operators, "kronecker_token_limit", limit)
        for _ in range(3):
            assert cann.find_token_limit(65536, torch.device("cpu")) == limit
        assert len(calls) == 1

    def test_split_only_beyond_it(
        self, column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
    ) -> None:
        linear = Linear(48, 192)
        layer, x = column(linear), inputs(192, 40)
        whole = output(layer, x)
        monkeypatch.setattr(torch_npu.operators, "kronecker_token_limit", 16)
        monkeypatch.setattr(cann, "_token_limit", 16)
        for tokens, expected in ((16, 1), (17, 2), (40, 3)):
            calls.clear()
            assert torch.equal(output(layer, x[:tokens]), whole[:tokens])
            assert [name for name, _ in calls].count("npu_kronecker_quant") == expected
