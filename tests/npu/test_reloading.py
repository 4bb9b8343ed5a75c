# SPDX-License-Identifier: Apache-2.0
"""Another checkpoint loaded into a model that runs, and the first one again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model

from tests.conftest import swapped_layers
from tests.linears import relative_error
from tests.npu.linears import SAME_ROUNDINGS, inputs
from tests.npu.loading import engine_config
from tests.npu.micro import W4A4_LAYERS, assert_layers_compute, expected_output, reload
from tests.npu.processes import MICRO
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader


@pytest.fixture
def other(micro_copy: Path, edit_tensors: Callable[..., None]) -> Path:
    """A checkpoint whose layers are swapped and clip more."""
    edit_tensors({name: t * 0.75 if name.endswith("clip_ratio") else t for name, t in swapped_layers().items()})
    return micro_copy


def test_reloading(config: VllmConfig, model: torch.nn.Module, other: Path) -> None:
    """Another checkpoint, then the first one again; tensors stay where graphs have seen them."""
    layers = [layer for name, layer in model.named_modules() if name.endswith(tuple(W4A4_LAYERS))]
    addresses = [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]
    reload(model, config, other)
    assert_layers_compute(model, other)
    reload(model, config, MICRO)
    assert_layers_compute(model, MICRO)
    assert [parameter.data_ptr() for layer in layers for parameter in layer.parameters()] == addresses


def test_compiled_graphs_see_reloaded_weights(
    config: VllmConfig, model: torch.nn.Module, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph without breaks: every operator has a fake implementation, nothing reads a tensor's value."""
    # The compiler would ask the accelerator for its stream, and there is none behind the stand-in.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    name = "model.layers.0.mlp.gate_up_proj"
    layer = model.get_submodule(name)
    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, None), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    torch._dynamo.utils.counters.clear()
    for tokens in (7, 3):
        x = inputs(192, tokens)
        assert torch.equal(compiled(x), layer(x)[0])
    reload(model, config, other)
    x = inputs(192)
    found = compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    reload(model, config, MICRO)
    assert relative_error(found, expected_output(CheckpointReader(other), name, x)) < SAME_ROUNDINGS


def test_a_clip_ratio_that_captured_graphs_would_keep_is_refused(other: Path) -> None:
    """aclnnFlatQuant takes it as an attribute, which a captured graph holds for good."""
    config = engine_config(MICRO)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        reload(model, config, MICRO)  # the same values: nothing to refuse
        with pytest.raises(CheckpointError, match="captured graphs contain"):
            reload(model, config, other)
