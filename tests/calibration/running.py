# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one call, for tests."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_w4a4_plugin.calibration.model.rotated import RotatedModel
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.recipe import Recipe, load_recipe
from vllm_w4a4_plugin.calibration.run.job import Job, Settings
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.simulate import float_logits, quantized_logits

TUTORIAL_BITS = {**dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 4), "o_proj": 8}


def job(directory: Path, ids: torch.Tensor, recipe: str | Recipe = "tutorial", **settings: Any) -> Job:
    """What a run does."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    model = (RotatedModel if recipe.rotates_residual else StreamedModel)(directory)
    return Job(model, recipe, Settings(**settings), ids)


def quantize(
    directory: Path,
    output: Path,
    ids: torch.Tensor,
    recipe: str | Recipe = "tutorial",
    resume: bool = False,
    **settings: Any,
) -> Path:
    """Run; returns the output."""
    Quantization(job(directory, ids, recipe, **settings), output, resume).run()
    return output


def relative_logit_error(directory: Path, checkpoint: Path, ids: torch.Tensor) -> float:
    """|found - exact| / |exact| of a checkpoint's logits."""
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids)))
    found = torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids)))
    return ((found - exact).norm() / exact.norm()).item()


def divergence(directory: Path, checkpoint: Path, ids: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of a checkpoint's next-token predictions from the float model's."""
    return mean_divergence(
        directory, torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids))), ids
    )


def nearest_divergence(
    directory: Path, ids: torch.Tensor, bits: Mapping[str, int] = MappingProxyType(TUTORIAL_BITS)
) -> float:
    """The same for a model of transformers whose linear layers are rounded to nearest, without a transform.

    Args:
        directory: of the float model.
        ids: token ids [rows, length].
        bits: of weights and activations, by the last part of the layer's name; others stay as they are.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def rounded(x: torch.Tensor, width: int) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (width - 1) - 1)
        return (x / step).round() * step

    def forward(layer: torch.nn.Linear, width: int, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rounded(x, width), layer.weight, layer.bias)

    with torch.no_grad():
        for name, layer in model.named_modules():
            if width := bits.get(name.rpartition(".")[2]):
                layer.weight.copy_(rounded(layer.weight, width))
                layer.forward = partial(forward, layer, width)
        return mean_divergence(directory, model(ids).logits, ids)


def mean_divergence(directory: Path, logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of predictions [rows, length, vocabulary] from the float model's."""
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids))).log_softmax(-1)
    return (exact.exp() * (exact - logits.log_softmax(-1))).sum(-1).mean().item()


def bytes_of(directory: Path) -> dict[str, bytes]:
    """The contents of the files in a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}
