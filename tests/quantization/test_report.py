# SPDX-License-Identifier: Apache-2.0
"""The start-up table."""

from typing import Any

import pytest
import torch

from tests.linears import load
from tests.quantization.linears import Linear, column_layer, merged_pair

pytestmark = pytest.mark.usefixtures("vllm_context")


def test_the_table_is_logged_once_all_layers_are_ready(
    make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_w4a4_plugin.quantization import report

    logged: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda text, *args: logged.append(text % args))
    layer, gate, up = merged_pair(make_config)
    load(layer, {0: gate, 1: up})
    load(layer, {0: gate, 1: up})
    assert len(logged) == 1
    assert "W4A4_FLATQUANT_DYNAMIC" in logged[0]
    assert "vllm_w4a4::flatquant_linear" in logged[0]


def test_packing_is_told_in_lines_now_and_then(
    make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bar of ours would share its line with vLLM's."""
    from vllm_w4a4_plugin.quantization import report

    logged: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda text, *args: logged.append(text % args))
    layer, gate, up = merged_pair(make_config)
    load(layer, {0: gate, 1: up})
    assert [line for line in logged if "Packed" in line] == []
    monkeypatch.setattr(report, "PROGRESS_INTERVAL_S", 0.0)
    for _ in range(2):
        logged.clear()
        load(layer, {0: gate, 1: up})
        assert [line for line in logged if "Packed" in line] == ["Packed 1 of 2 weight tensors"]
    assert "\r" not in capfd.readouterr().err


@pytest.mark.parametrize("is_faulty", [False, True])
def test_vllm_names_its_kernel_only_where_it_is_used(
    make_config: Any,
    at_rank: Any,
    is_faulty: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm import logger as vllm_logger

    from vllm_w4a4_plugin.quantization.schemes import w8a8_dynamic

    if is_faulty:
        monkeypatch.setattr(w8a8_dynamic, "TOLERATED_ERROR", -1.0)
    w8a8_dynamic.fault_of_vllm_kernel.cache_clear()
    vllm_logger._print_info_once.cache_clear()
    with caplog.at_level("INFO", logger=w8a8_dynamic.KERNEL_LOGGER):
        column_layer(make_config(proj=Linear(16, "W8A8_DYNAMIC", 0)), 16)
    fault = w8a8_dynamic.fault_of_vllm_kernel(torch.float32)
    w8a8_dynamic.fault_of_vllm_kernel.cache_clear()
    assert not (is_faulty and not fault)
    assert ("Selected" in caplog.text) == (not fault)
