# SPDX-License-Identifier: Apache-2.0
"""The micro checkpoint's W4A4 layers in a loaded model: compared with the reference, and loaded again."""

from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from tests.linears import relative_error
from tests.npu.linears import SAME_ROUNDINGS, inputs
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.ops import reference

W4A4_LAYERS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def expected_output(reader: CheckpointReader, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What the two NPU operators compute for a fused layer of the checkpoint, by the reference."""
    parent, _, leaf = layer.rpartition(".")
    outputs = []
    for shard in W4A4_LAYERS[f"{parent.rpartition('.')[2]}.{leaf}"]:
        t = {
            name: reader.load(f"{parent}.{shard}.{name}")
            for name in ("weight", "weight_scale", "left_trans", "right_trans", "clip_ratio")
        }
        outputs.append(
            reference.flatquant_linear_npu(
                x, t["weight"], t["weight_scale"].squeeze(1), t["left_trans"], t["right_trans"], t["clip_ratio"].item()
            )
        )
    return torch.cat(outputs, -1)


def assert_layers_compute(model: torch.nn.Module, directory: Path) -> None:
    reader = CheckpointReader(directory)
    for number in range(2):
        for suffix in W4A4_LAYERS:
            name = f"model.layers.{number}.{suffix}"
            x = inputs(192)
            found = model.get_submodule(name)(x)[0]
            assert relative_error(found, expected_output(reader, name, x)) < SAME_ROUNDINGS, name


def reload(model: torch.nn.Module, config: VllmConfig, directory: Path) -> None:
    """What vLLM's model runner does for `reload_weights`."""
    loader = get_model_loader(config.load_config)
    config.model_config.model, before = str(directory), config.model_config.model
    try:
        initialize_layerwise_reload(model)
        model.load_weights(loader.get_all_weights(config.model_config, model))
        finalize_layerwise_reload(model, config.model_config)
    finally:
        config.model_config.model = before
