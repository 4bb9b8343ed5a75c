# SPDX-License-Identifier: Apache-2.0
"""What parameters hold after loading."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from tests.linears import load
from tests.quantization.linears import IN, KINDS, Linear, column_layer

pytestmark = pytest.mark.usefixtures("vllm_context")


def test_int4_weights_stay_half_a_byte(make_config: Any, at_rank: Any) -> None:
    config = make_config(proj=Linear(48, "W4A4_FLATQUANT_DYNAMIC", 0))
    layer = column_layer(config, 48)
    assert layer.weight.numel() * layer.weight.element_size() == 48 * IN // 2


def test_clips_that_differ_by_rounding_are_averaged(make_config: Any, at_rank: Any) -> None:
    gate, up = Linear(16, KINDS[0], 0), Linear(16, KINDS[0], 1)
    gate.clip_ratio, up.clip_ratio = torch.tensor([0.9300]), torch.tensor([0.9302])
    config = make_config(gate_proj=gate, up_proj=up)
    layer = MergedColumnParallelLinear(
        IN, [16, 16], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
    )
    load(layer, {0: gate, 1: up})
    assert layer.clip_ratio.tolist() == pytest.approx([0.9301, 0.9301], abs=1e-6)
