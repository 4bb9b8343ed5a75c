# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one call, for tests."""

from pathlib import Path
from typing import Any

import torch

from vllm_w4a4_plugin.calibration.model.rotated import RotatedModel
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.recipe import Recipe, load_recipe
from vllm_w4a4_plugin.calibration.run.job import Job, Settings
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.simulate import float_logits, quantized_logits


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


def bytes_of(directory: Path) -> dict[str, bytes]:
    """The contents of the files in a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}
