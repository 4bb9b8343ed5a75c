# SPDX-License-Identifier: Apache-2.0
"""Token weights against gradients of the whole model."""

from collections.abc import Callable
from pathlib import Path

import torch

from vllm_w4a4_plugin.calibration import fisher
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Role
from vllm_w4a4_plugin.calibration.progress import silent


def test_weights_are_squared_gradients_of_the_loss(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory, ids = float_model("llama"), ids[:3]
    fisher.measure(StreamedModel(directory), ids, tmp_path, silent)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, args: object, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        model.get_submodule(f"model.layers.0.{name}").register_forward_hook(keep(name))
    model(input_ids=ids, labels=ids).loss.backward()
    squared = sum(output.grad.square().sum(-1).flatten() for output in outputs.values() if output.grad is not None)
    assert isinstance(squared, torch.Tensor)
    weights = (squared / squared.mean()).clamp_max(fisher.LARGEST_WEIGHT)
    found = fisher.token_weights(tmp_path, 0, Role.GATE_UP)
    assert torch.allclose(found, weights / weights.mean(), rtol=1e-3, atol=1e-5)
    assert {file.name for file in tmp_path.iterdir()} == {"fisher-00000.safetensors", "fisher-00001.safetensors"}
