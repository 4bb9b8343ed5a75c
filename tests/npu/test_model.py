# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of the real tool through vLLM's real loader: which layer is whose, and what it computes."""

import torch
from vllm.config import VllmConfig

from tests.linears import relative_error
from tests.npu.linears import SAME_ROUNDINGS, inputs
from tests.npu.micro import W4A4_LAYERS, assert_layers_compute
from tests.npu.processes import MICRO
from vllm_w4a4_plugin.capacity.devices import find_device
from vllm_w4a4_plugin.capacity.memory import Serving, plan_memory
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.ops.npu.select import Kernel


def test_layers_get_the_right_classes(model: torch.nn.Module) -> None:
    found = {
        name: (type(layer).__name__, type(method).__name__, type(getattr(method, "quant_method", None)).__name__)
        for name, layer in model.named_modules()
        if (method := getattr(layer, "quant_method", None)) and name.startswith(("model.layers.1.", "lm_head"))
    }
    assert found == {
        "model.layers.1.self_attn.qkv_proj": (
            "AscendQKVParallelLinear",
            "AscendW4A4NpuLinearMethod",
            "W4A4NpuScheme",
        ),
        "model.layers.1.self_attn.o_proj": (
            "AscendRowParallelLinear",
            "AscendLinearMethod",
            "AscendW8A8DynamicLinearMethod",
        ),
        "model.layers.1.mlp.gate_up_proj": (
            "AscendMergedColumnParallelLinear",
            "AscendW4A4NpuLinearMethod",
            "W4A4NpuScheme",
        ),
        "model.layers.1.mlp.down_proj": ("AscendRowParallelLinear", "AscendUnquantizedLinearMethod", "NoneType"),
        "lm_head": ("AscendParallelLMHead", "UnquantizedEmbeddingMethod", "NoneType"),
    }


def test_layers_compute_what_the_operators_are_documented_to(model: torch.nn.Module) -> None:
    assert_layers_compute(model, MICRO)


def test_a_type_that_is_not_ours_runs_in_vllm_ascends_own_scheme(model: torch.nn.Module) -> None:
    reader, name = CheckpointReader(MICRO), "model.layers.0.self_attn.o_proj"
    x = inputs(256)
    found = model.get_submodule(name)(x)[0]
    expected = reference.w8a8_linear(x, reader.load(f"{name}.weight"), reader.load(f"{name}.weight_scale").squeeze(1))
    assert relative_error(found, expected) < SAME_ROUNDINGS


def test_the_table_names_every_kernel(config: VllmConfig, model: torch.nn.Module) -> None:
    rows = [line.split("  ") for line in config.quant_config.report.table().splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["FLOAT", "2", "0.3 MiB", "vllm-ascend AscendUnquantizedLinearMethod"],
        ["W4A4_FLATQUANT_DYNAMIC", "4", "0.2 MiB", Kernel.KRONECKER],
        ["W8A8_DYNAMIC", "2", "0.1 MiB", "vllm-ascend AscendW8A8DynamicLinearMethod"],
    ]


def test_the_doctor_planned_what_was_loaded(model: torch.nn.Module) -> None:
    """Bytes of the loaded W4A4 layers, whole layers with scales, offsets and transforms."""
    planned = plan_memory(read_model(MICRO), find_device("910B2"), Serving())
    loaded = sum(
        parameter.numel() * parameter.element_size()
        for name, layer in model.named_modules()
        if name.endswith(tuple(W4A4_LAYERS))
        for parameter in layer.parameters(recurse=False)
    )
    clip_ratios = 4 * sum(len(shards) for shards in W4A4_LAYERS.values()) * 2
    assert planned.weights["W4A4_FLATQUANT_DYNAMIC"] == loaded - clip_ratios
