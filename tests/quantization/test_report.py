# SPDX-License-Identifier: Apache-2.0
"""The start-up table."""

from typing import Any

import pytest

from tests.linears import load
from tests.quantization.linears import merged_pair

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
