# SPDX-License-Identifier: Apache-2.0
"""A model with dummy weights computes, and its numbers have ordinary sizes."""

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from tests.conftest import MICRO
from tests.loading import loaded_model
from vllm_w4a4_plugin.quantization.linear import AscendW4A4LinearMethod


@pytest.mark.feature("`--load-format dummy`")
def test_every_quantized_layer_computes() -> None:
    with loaded_model(MICRO, load_format="dummy") as model:
        methods = (module for module in model.modules() if isinstance(module, LinearBase))
        layers = [layer for layer in methods if isinstance(layer.quant_method, AscendW4A4LinearMethod)]
        assert len(layers) == 6
        for layer in layers:
            y = layer(torch.randn(5, layer.input_size, dtype=torch.bfloat16))[0]
            assert y.isfinite().all()
            assert 0.1 < y.float().std() < 100
